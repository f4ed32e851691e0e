"""Airflow's login page: users and roles live in the metadata database (Flask AppBuilder)."""

from flask_appbuilder.const import AUTH_DB

AUTH_TYPE = AUTH_DB
WTF_CSRF_ENABLED = True
# Nobody registers; `make airflow ARGS="users create ..."` adds people.
AUTH_USER_REGISTRATION = False
