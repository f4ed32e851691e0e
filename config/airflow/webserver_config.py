"""Airflow's login page: users and roles live in the metadata database (Flask AppBuilder)."""

from flask_appbuilder.const import AUTH_DB

AUTH_TYPE = AUTH_DB
WTF_CSRF_ENABLED = True
# Nobody registers; `make user` adds people, to MLflow as well.
AUTH_USER_REGISTRATION = False
