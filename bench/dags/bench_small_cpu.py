"""An Airflow dag of 40 tasks in a row."""

from bench_work import chain

chain("bench_small_cpu", length=40, n=10)
