"""Airflow's scheduler and API server, awake when there is something to do.

`wakeup.database` has the metadata database say so; `wakeup.scheduler` is Airflow's scheduler with a pause that such a
word ends; `wakeup.apiserver` is Airflow's API server, which has done the work of its first request before it listens.
"""
