"""The scheduler acts at once on what happens in the metadata database, instead of looking every second.

`wakeup.database` has the database say when there is something to do; `wakeup.scheduler` is Airflow's
scheduler with a pause that such a word ends.
"""
