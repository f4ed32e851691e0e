"""Predictions over HTTP from the version of a registered model that has an alias.

app             HTTP: the routes, the token, what is answered
inputs          what a client sent, held against what the model takes
model           a model in memory
registry        what MLflow says of the alias
follower        brings the one that MLflow names into memory, and puts it in the other's place
prediction_log  what was answered, on its way to the store
store           the store
metrics         figures for Prometheus
"""
