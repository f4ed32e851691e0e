"""An Airflow dag of 20 tasks in a row."""

from bench_work import chain

chain("bench_chain", length=20, n=1)
