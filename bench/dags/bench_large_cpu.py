"""An Airflow dag of 10 tasks in a row."""

from bench_work import chain

chain("bench_large_cpu", length=10, n=33)
