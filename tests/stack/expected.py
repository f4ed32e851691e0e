"""What the stack must be made of: one entry a service. Sets are compared whole, so that one more
container, port, mount or secret fails."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Expected:
    """One container."""

    image: str
    uid: int
    networks: frozenset[str]
    secrets: frozenset[str]
    mounts: dict[str, bool]
    """Destination of each bind and volume, secrets apart -> whether it is writable."""
    limit: str
    """The plan's variable of its memory limit, or a fixed one such as 128m."""
    port: str = ""
    """Container port -> published through the setting of this name."""
    job: bool = False
    processes: frozenset[str] = field(default_factory=frozenset)


def _set(words: str) -> frozenset[str]:
    return frozenset(words.split())


_CODE = {
    "/opt/airflow/airflow.cfg": False,
    "/opt/airflow/webserver_config.py": False,
    "/opt/airflow/dags": False,
    "/opt/airflow/plugins": False,
}
_LOGS = "/opt/airflow/logs"

SERVICES = {
    "postgres": Expected(
        "postgres",
        10001,
        _set("backend"),
        _set("postgres_password airflow_db_password celery_db_password mlflow_db_password mlflow_auth_db_password"),
        {"/var/lib/postgresql": True, "/etc/postgres": False},
        "POSTGRES_MEMORY",
    ),
    "redis": Expected(
        "redis",
        10002,
        _set("backend"),
        _set("redis_acl redis_password"),
        {"/data": True, "/etc/redis": False},
        "REDIS_MEMORY",
    ),
    "minio": Expected(
        "minio",
        10003,
        _set("backend"),
        _set("minio_root_password"),
        {"/data": True},
        "MINIO_MEMORY",
    ),
    "minio-init": Expected(
        "minio-init",
        10003,
        _set("backend"),
        _set("minio_root_password mlflow_s3_secret airflow_logs_s3_secret pipelines_s3_secret serving_s3_secret"),
        {"/etc/minio": False},
        "128m",
        job=True,
    ),
    "mlflow-init": Expected(
        "mlflow",
        10004,
        _set("backend"),
        _set(
            "mlflow_backend_url mlflow_auth_ini mlflow_flask_secret admin_password "
            "mlflow_airflow_password mlflow_serving_password"
        ),
        {},
        "512m",
        job=True,
    ),
    "mlflow": Expected(
        "mlflow",
        10004,
        _set("backend frontend"),
        _set(
            "mlflow_backend_url mlflow_auth_ini mlflow_flask_secret mlflow_kek_passphrase "
            "mlflow_s3_secret mlflow_probe_header"
        ),
        {"/tmp": True},
        "MLFLOW_MEMORY",
        port="mlflow_port",
    ),
    "airflow-init": Expected(
        "airflow",
        50000,
        _set("backend"),
        _set("airflow_db_url fernet_key broker_url celery_result_url admin_password"),
        _CODE,
        "768m",
        job=True,
    ),
    "airflow-apiserver": Expected(
        "airflow",
        50000,
        _set("backend frontend"),
        _set("airflow_db_url fernet_key api_secret_key jwt_secret conn_stack_logs"),
        _CODE | {_LOGS: False},
        "APISERVER_MEMORY",
        port="airflow_port",
    ),
    "airflow-scheduler": Expected(
        "airflow",
        50000,
        _set("backend"),
        _set("airflow_db_url fernet_key jwt_secret broker_url celery_result_url"),
        _CODE,
        "SCHEDULER_MEMORY",
    ),
    "airflow-dag-processor": Expected(
        "airflow",
        50000,
        _set("backend frontend"),
        _set("airflow_db_url fernet_key"),
        _CODE,
        "DAG_PROCESSOR_MEMORY",
    ),
    "airflow-triggerer": Expected(
        "airflow",
        50000,
        _set("backend frontend"),
        _set("airflow_db_url fernet_key conn_stack_logs"),
        _CODE | {_LOGS: True},
        "TRIGGERER_MEMORY",
    ),
    # No metadata database, no Fernet key, no JWT secret.
    "airflow-worker": Expected(
        "airflow",
        50000,
        _set("backend frontend"),
        _set("broker_url celery_result_url conn_stack_logs conn_stack_data mlflow_airflow_password serving_token"),
        _CODE | {_LOGS: True, "/tmp": True, "/var/lib/taskguard": True},
        "WORKER_MEMORY",
    ),
}

FLOWER = Expected(
    "airflow",
    50000,
    _set("backend frontend"),
    _set("broker_url celery_result_url flower_basic_auth"),
    {"/opt/airflow/airflow.cfg": False},
    "FLOWER_MEMORY",
    port="flower_port",
)

_GIT = {
    # The worker and the DAG processor have a copy each; the worker takes its own from the DAG processor's.
    "airflow-dag-processor": ({"/var/lib/dag-bundles": True}, _set("conn_dags_git")),
    "airflow-worker": ({"/var/lib/dag-bundles": True, "/var/lib/dag-source": False}, frozenset()),
}
_GIT_BY_SCHEME: dict[str, tuple[dict[str, bool], frozenset[str]]] = {
    "https": ({"/run/git-ca.pem": False}, frozenset()),
    "ssh": ({}, _set("dags_git_known_hosts")),
    "file": ({"/srv/dags.git": False}, frozenset()),
}
GIT_VOLUMES = _set("dag-bundles worker-dag-bundles")


def with_git(scheme: str) -> dict[str, Expected]:
    """The services that are different where DAGs come from a Git repository."""
    found = {}
    for name, (mounts, secrets) in _GIT.items():
        own = _GIT_BY_SCHEME[scheme] if name == "airflow-dag-processor" else ({}, frozenset())
        was = SERVICES[name]
        found[name] = replace(was, mounts=was.mounts | mounts | own[0], secrets=was.secrets | secrets | own[1])
    return found


SERVING = Expected(
    "serving",
    10005,
    _set("backend frontend"),
    _set("mlflow_serving_password serving_s3_secret serving_token"),
    {},
    "SERVING_MEMORY",
    port="serving_port",
)

OPT_IN = {"flower": FLOWER, "serving": SERVING}
"""Setting, which is also the service's name -> what it is where it is on."""

VOLUMES = _set("postgres minio redis airflow-task-logs worker-scratch worker-ledger mlflow-spool")
NETWORKS = _set("backend frontend")
