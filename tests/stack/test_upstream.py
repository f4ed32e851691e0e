"""What taskguard, tasklogs and wakeup rely on without a public promise, each by its name: a new Airflow that changes
one of these is noticed here first, not in a task that went unwatched or a scheduler that became slow."""

from __future__ import annotations

import contextlib
import json
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import StackUnderTest

SCHEDULER = "airflow-scheduler"
# A task's log as Airflow sets it up and taskguard bounds it, into a buffer.
BOUND = """
import io, logging, structlog
from airflow.sdk.log import configure_logging
from taskguard import output
buffer = io.BytesIO()
configure_logging(json_output=True, output=buffer, sending_to_supervisor=True)
output.bound()
"""


def in_airflow(stack: StackUnderTest, code: str, service: str = "airflow-worker") -> None:
    """Runs assertions in one of Airflow's containers."""
    told = stack.python(service, code)
    assert told.code == 0, told.output


def test_the_task_runner_announces_itself_with_a_marker(stack: StackUnderTest) -> None:
    """listener.on_starting knows a task's process by that class's name: it runs for other processes too."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.sdk.execution_time import task_runner\n"
        "from taskguard import listener\n"
        "assert listener._is_task(task_runner.TaskRunnerMarker())\n"
        "assert not listener._is_task(object())\n"
        "text = inspect.getsource(task_runner)\n"
        "for hook in ('on_starting', 'before_stopping'):\n"
        "    assert f'hook.{hook}(component=TaskRunnerMarker())' in text, hook\n",
    )


def test_celery_is_given_the_workload_as_json(stack: StackUnderTest) -> None:
    """preload.supervise reads the instance's name and its log's path from it."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.executors.workloads import ExecuteTask\n"
        "from airflow.providers.celery.executors.celery_executor_utils import execute_workload\n"
        "assert list(inspect.signature(execute_workload.run).parameters) == ['input']\n"
        "assert {'ti', 'log_path'} <= set(ExecuteTask.model_fields)\n"
        "names = {'dag_id', 'task_id', 'run_id', 'map_index', 'try_number'}\n"
        "assert names <= set(ExecuteTask.model_fields['ti'].annotation.model_fields)\n",
    )


def test_a_task_knows_whether_it_goes_on(stack: StackUnderTest) -> None:
    """listener._goes_on asks by these names: without them one that was deferred would be sent away, and begin anew."""
    in_airflow(
        stack,
        "from airflow.sdk.execution_time.task_runner import RuntimeTaskInstance\n"
        "from airflow.sdk.api.datamodels._generated import TIRunContext\n"
        "assert '_ti_context_from_server' in RuntimeTaskInstance.__private_attributes__\n"
        "assert 'next_method' in TIRunContext.model_fields\n",
    )


def test_structlogs_loggers_share_one_list_of_processors(stack: StackUnderTest) -> None:
    """output.bound cuts what loggers write that were made before it: it changes that list in place."""
    in_airflow(
        stack,
        "import io, structlog\n"
        "from airflow.sdk.log import configure_logging\n"
        "buffer = io.BytesIO()\n"
        "configure_logging(json_output=True, output=buffer, sending_to_supervisor=True)\n"
        "early = structlog.get_logger('early').bind()\n"
        "from taskguard import output\n"
        "output.bound()\n"
        "early.info('y' * 10**6)\n"
        "written = buffer.getvalue()\n"
        "assert b'cut here' in written and len(written) < 2 * output.LONGEST_LINE, written[:300]\n",
    )


@pytest.mark.parametrize(
    "write",
    [
        "logging.getLogger('a').info('row %s', 'x' * 1000)",
        "logging.getLogger('a').info('\u4e16' * 1000)",
        "logging.getLogger('a').error('failed', exc_info=ValueError('x' * 1000))",
        "structlog.get_logger('a').error('failed', exc_info=ValueError('x' * 1000))",
        "structlog.get_logger('a').info('row', parts=['x' * 1000])",
    ],
)
def test_a_log_is_metered_as_it_is_written(stack: StackUnderTest, write: str) -> None:
    """output.bound renders no record itself: it wraps what Airflow put last, in structlog and in `logging`. 16 MiB
    in the file would end the task."""
    in_airflow(
        stack,
        BOUND + "for _ in range(14_000):\n"
        f"    {write}\n"
        "most = output.LONGEST_LOG * (1.5 if b'failed' in buffer.getvalue() else 1)\n"
        "assert 0.99 * most < len(buffer.getvalue()) <= most\n",
    )


def test_an_error_is_kept_after_all_that_was_dropped(stack: StackUnderTest) -> None:
    """It comes last and matters most; what was dropped takes no room from it."""
    in_airflow(
        stack,
        BOUND + "for _ in range(14_000):\n"
        "    logging.getLogger('a').info('x' * 1000)\n"
        "logging.getLogger('a').error('the last words')\n"
        "assert b'the last words' in buffer.getvalue()\n",
    )


def test_a_long_exception_is_cut(stack: StackUnderTest) -> None:
    """In a record of `logging` too: its traceback is a list in the event."""
    in_airflow(
        stack,
        BOUND + "logging.getLogger('a').error('failed', exc_info=ValueError('x' * 10**6))\n"
        "written = buffer.getvalue()\n"
        "assert b'cut here' in written and len(written) < 2 * output.LONGEST_LINE, written[:300]\n",
    )


def test_the_context_of_a_tasks_log_names_the_instance(stack: StackUnderTest) -> None:
    """listener.on_starting asks for its budget under that name, before the DAG is read."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.sdk.execution_time import task_runner\n"
        "text = inspect.getsource(task_runner)\n"
        "assert 'bind_contextvars' in text\n"
        "for name in ('dag_id', 'task_id', 'run_id', 'map_index', 'try_number'):\n"
        "    assert f'{name}=' in text, name\n",
    )


def test_an_operators_resources_reach_the_task(stack: StackUnderTest) -> None:
    """resources={'ram': MB} is public; that it ends up in `resources.ram.qty` is not written anywhere."""
    in_airflow(
        stack,
        "from airflow.providers.standard.operators.empty import EmptyOperator\n"
        "made = EmptyOperator(task_id='a', resources={'ram': 700})\n"
        "assert made.resources.ram.qty == 700\n"
        "assert EmptyOperator(task_id='b').resources is None\n",
    )


def test_the_schedulers_pause_is_found_in_its_module(stack: StackUnderTest) -> None:
    """wakeup.scheduler puts a clock of its own in the place of `time` there."""
    in_airflow(
        stack,
        "import inspect, time\n"
        "from airflow.jobs import scheduler_job_runner as module\n"
        "assert module.time is time\n"
        "text = inspect.getsource(module.SchedulerJobRunner._run_scheduler_loop)\n"
        "assert 'time.sleep(min(self._scheduler_idle_sleep_time, next_event or 0))' in text\n",
        SCHEDULER,
    )


def test_the_scheduler_reads_how_often_a_queued_task_is_queued_again(stack: StackUnderTest) -> None:
    """[scheduler] num_stuck_in_queued_retries stands in its code and nowhere else."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.jobs.scheduler_job_runner import SchedulerJobRunner as runner\n"
        "assert 'key=\"num_stuck_in_queued_retries\"' in inspect.getsource(runner.__init__)\n"
        "text = inspect.getsource(runner._maybe_requeue_stuck_ti)\n"
        "assert 'num_times_stuck < self._num_stuck_queued_retries' in text\n",
        SCHEDULER,
    )


def test_the_executor_rests_while_tasks_wait(stack: StackUnderTest) -> None:
    """wakeup.scheduler adds that to the heartbeat, which the scheduler's loop calls once a round; `running`
    has the tasks that were sent and have not ended."""
    in_airflow(
        stack,
        "import inspect, time\n"
        "from airflow.jobs.scheduler_job_runner import SchedulerJobRunner\n"
        "from airflow.providers.celery.executors.celery_executor import CeleryExecutor\n"
        "from wakeup import pace, scheduler\n"
        "assert inspect.getsource(SchedulerJobRunner._run_scheduler_loop).count('executor.heartbeat()') == 1\n"
        "executor = CeleryExecutor()\n"
        "scheduler.rest_while_tasks_wait(pace.Pace(2, 4))\n"
        "def beat(tasks):\n"
        "    executor.running = set(range(tasks))\n"
        "    begun = time.monotonic()\n"
        "    executor.heartbeat()\n"
        "    return time.monotonic() - begun\n"
        "assert beat(2) < pace.LEAST_S <= beat(3)\n",
        SCHEDULER,
    )


def test_a_round_sends_before_it_looks_what_has_ended(stack: StackUnderTest) -> None:
    """What a heartbeat sends is in `running` after it, and says nothing of whether the worker ran dry: wakeup.scheduler
    leaves it out. Four are sent to a worker that had none left: it may have twice as many. Then half are left."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.executors.base_executor import BaseExecutor\n"
        "from airflow.providers.celery.executors.celery_executor import CeleryExecutor\n"
        "from wakeup import pace, scheduler\n"
        "text = inspect.getsource(BaseExecutor.heartbeat)\n"
        "assert 0 < text.index('self.trigger_tasks(') < text.index('self.sync()')\n"
        "assert CeleryExecutor.heartbeat is BaseExecutor.heartbeat\n"
        "def send(executor):\n"
        "    executor.running.update(executor.queued_tasks)\n"
        "    executor.queued_tasks.clear()\n"
        "CeleryExecutor.heartbeat = send\n"
        "scheduler.rest_while_tasks_wait(pace.Pace(2, 4))\n"
        "executor = CeleryExecutor()\n"
        "executor.parallelism = 4\n"
        "for tasks in range(4), range(4, 8):\n"
        "    executor.queued_tasks = dict.fromkeys(tasks)\n"
        "    executor.heartbeat()\n"
        "    assert executor.parallelism == 8, executor.parallelism\n",
        SCHEDULER,
    )


def test_the_executor_is_sent_what_its_parallelism_says(stack: StackUnderTest) -> None:
    """wakeup.scheduler changes it from round to round, below the scheduler's own bound, which is read once."""
    in_airflow(
        stack,
        "import inspect, os\n"
        "from airflow.jobs.job import Job\n"
        "from airflow.jobs.scheduler_job_runner import SchedulerJobRunner\n"
        "from airflow.providers.celery.executors.celery_executor import CeleryExecutor\n"
        "executor = CeleryExecutor()\n"
        "assert executor.parallelism == int(os.environ['AIRFLOW__CORE__PARALLELISM'])\n"
        "os.environ['AIRFLOW__CORE__PARALLELISM'] = '99'\n"
        "assert SchedulerJobRunner(job=Job())._parallelism == 99\n"
        "assert CeleryExecutor().parallelism == executor.parallelism != 99\n"
        "executor.parallelism, executor.running = 3, {1, 2}\n"
        "assert executor.slots_available == 1\n"
        "text = inspect.getsource(SchedulerJobRunner._executable_task_instances_to_queued)\n"
        "assert 'executor_slots_available[executor.name] = executor.slots_available' in text\n",
        SCHEDULER,
    )


def test_the_api_for_tasks_makes_its_routes_at_the_first_request(stack: StackUnderTest) -> None:
    """wakeup.apiserver has them made before: when the routers are included, which is done once."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.api_fastapi.execution_api import app as execution\n"
        "text = inspect.getsource(execution.create_task_execution_api_app)\n"
        "assert text.count('app.generate_and_include_versioned_routers(') == 1\n"
        "plain = execution.create_task_execution_api_app()\n"
        "assert not plain._cadwyn_initialized\n"
        "plain._cadwyn_initialize()\n"
        "from wakeup import apiserver\n"
        "ours = execution.create_task_execution_api_app()\n"
        "assert ours._cadwyn_initialized\n"
        "made = ours.router.versioned_routers\n"
        "assert sorted(made.due) == sorted(made)[:-1], made.due\n"
        "for version, router in plain.router.versioned_routers.items():\n"
        "    assert router.routes, version\n"
        "    assert [one.path for one in made[version].routes] == [one.path for one in router.routes], version\n",
        "airflow-apiserver",
    )


def test_the_git_bundle_keeps_its_copies_there(stack: StackUnderTest) -> None:
    """The worker's repository is the DAG processor's bare copy; dag-checkouts looks through the versions, and for the
    lock on one that a task uses; dagsource.CommitBundle is told of each commit by refresh()."""
    in_airflow(
        stack,
        "import atexit, fcntl, inspect, os, shutil\n"
        "os.environ['AIRFLOW__DAG_PROCESSOR__DAG_BUNDLE_STORAGE_PATH'] = '/tmp/upstream'\n"
        "atexit.register(shutil.rmtree, '/tmp/upstream', ignore_errors=True)\n"
        "os.environ['AIRFLOW_CONN_DAGS_GIT'] = '{\"conn_type\": \"git\"}'\n"
        "from airflow.dag_processing.bundles.base import BundleVersionLock\n"
        "from dagsource import CommitBundle\n"
        "words = {'name': 'dags-git', 'tracking_ref': 'main', 'repo_url': 'file:///x', 'git_conn_id': 'dags_git'}\n"
        "made = CommitBundle(**words)\n"
        "assert made.hook and not made.hook.auth_token\n"
        "assert str(made.bare_repo_path) == '/tmp/upstream/dags-git/bare'\n"
        "assert str(made.path) == '/tmp/upstream/dags-git/tracking_repo'\n"
        "assert str(CommitBundle(**words, version='v1').path) == '/tmp/upstream/dags-git/versions/v1'\n"
        "assert 'self.refresh()' in inspect.getsource(type(made)._initialize)\n"
        "with BundleVersionLock('dags-git', 'v1'), open('/tmp/upstream/_tracking/dags-git/v1') as mark:\n"
        "    try:\n"
        "        fcntl.flock(mark, fcntl.LOCK_EX | fcntl.LOCK_NB)\n"
        "    except BlockingIOError:\n"
        "        pass\n"
        "    else:\n"
        "        raise AssertionError('a version in use is not locked')\n",
    )


def test_the_tools_for_a_repository_are_there(stack: StackUnderTest) -> None:
    """git trusts the place of a mounted folder alone; ssh asks nobody; neither needs the Perl that was left out."""
    told = stack.exec("airflow-dag-processor", "git", "config", "--system", "--get-all", "safe.directory")
    assert told.output.split() == ["/srv/dags.git", "/srv/dags.git/.git"]
    told = stack.exec("airflow-dag-processor", "ssh", "-G", "git.example")
    assert "batchmode yes" in told.output, told.output
    clone = "cd $(mktemp -d) && git init -q --bare a && git clone -q file://$PWD/a b && git -C b gc -q"
    told = stack.exec("airflow-worker", "bash", "-c", clone)
    assert told.code == 0, told.output


def test_mlflows_s3_store_asks_for_its_client_there(stack: StackUnderTest) -> None:
    """mlstack_artifacts gives it one client for good; and MLflow's FastAPI application keeps its middleware in a
    list that mlstack_server puts its own around and inside of."""
    in_airflow(
        stack,
        "import inspect, os\n"
        "os.environ['_MLFLOW_SGI_NAME'] = 'uvicorn'\n"
        "from mlflow.store.artifact.s3_artifact_repo import S3ArtifactRepository\n"
        "from mlstack_artifacts import ProxiedS3ArtifactRepository, s3_client\n"
        "assert callable(S3ArtifactRepository._get_s3_client)\n"
        "assert 'self._get_s3_client()' in inspect.getsource(S3ArtifactRepository.log_artifact)\n"
        "assert ProxiedS3ArtifactRepository('proxied-s3://mlflow')._s3._get_s3_client() is s3_client()\n"
        "from mlstack_logins import OnlyModels\n"
        "from uvicorn import Server\n"
        "loop = inspect.getsource(Server.main_loop)\n"
        "assert 'await asyncio.sleep(0.1)' in loop and loop.count('self.on_tick(counter)') == 2, loop\n"
        "from mlstack_server import Around, Fork, Inside, create_app\n"
        "middleware = [one.cls for one in create_app().user_middleware]\n"
        "assert middleware[:3] == [OnlyModels, Fork, Around], middleware\n"
        "assert middleware[-1] is Inside and len(middleware) > 5, middleware\n",
        "mlflow",
    )


def test_what_goes_to_flask_at_once_is_flasks(stack: StackUnderTest) -> None:
    """No path of Flask's that mlstack_server.FLASK matches is FastAPI's as well, and the middleware that is left
    out there is what there is."""
    in_airflow(
        stack,
        "import os\n"
        "os.environ['_MLFLOW_SGI_NAME'] = 'uvicorn'\n"
        "from mlflow.server import app as flask, auth\n"
        "from mlstack_server import FLASK, NOT_FOR_FLASK\n"
        "app = auth.create_app()\n"
        "native = auth._native_fastapi_routes(app)\n"
        "def fastapis(path, method):\n"
        "    scope = {'type': 'http', 'path': path, 'root_path': '', 'method': method, 'headers': []}\n"
        "    return auth._scope_matches_native_route(native, scope)\n"
        "assert fastapis('/api/2.0/mlflow-artifacts/artifacts/a', 'PUT')\n"
        "rules = [(one.rule, method) for one in flask.url_map.iter_rules() if FLASK.match(one.rule)\n"
        "         for method in one.methods]\n"
        "assert len(rules) > 200, len(rules)\n"
        "assert [one for one in rules if fastapis(*one)] == []\n"
        "dispatched = {one.kwargs['dispatch'].__name__ for one in app.user_middleware if 'dispatch' in one.kwargs}\n"
        "assert dispatched == NOT_FOR_FLASK, dispatched\n",
        "mlflow",
    )


def test_airflow_reads_logs_in_pieces_where_it_can(stack: StackUnderTest) -> None:
    """tasklogs adds the interface that Airflow's own S3 logs lack; once they have one, it has had its day. A log that
    goes while it is read is told in its place."""
    in_airflow(
        stack,
        "import inspect\n"
        "from airflow.logging_config import get_remote_task_log\n"
        "from airflow.providers.amazon.aws.log.s3_task_handler import S3RemoteLogIO\n"
        "from airflow.utils.log.file_task_handler import FileTaskHandler\n"
        "logs = get_remote_task_log()\n"
        "assert type(logs).__name__ == 'StreamedLogs' and not hasattr(S3RemoteLogIO, 'stream')\n"
        "text = inspect.getsource(FileTaskHandler._read_remote_logs)\n"
        "assert 'getattr(remote_io, \"stream\", None)' in text, text\n"
        "(told,) = logs._lines('airflow-logs', 'none')\n"
        "assert told.startswith('Could not read logs from s3://airflow-logs/none with error'), told\n",
        "airflow-apiserver",
    )


RESULT = "of-a-test"


@pytest.fixture
def results(stack: StackUnderTest) -> Iterator[Any]:
    """Celery's results, with the worker's login; those of this test are removed."""
    connection = stack.database("celery")
    connection.autocommit = True
    with contextlib.closing(connection), connection.cursor() as cursor:
        yield cursor
        cursor.execute("DELETE FROM celery_taskmeta WHERE task_id LIKE %s", (f"{RESULT}%",))


def test_the_scheduler_unpickles_nothing_that_the_worker_wrote(stack: StackUnderTest, results: Any) -> None:
    """Code in a task can write there what runs when it is unpickled. What the worker itself writes is read."""

    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.system, ("touch /tmp/unpickled",)

    results.execute(
        "INSERT INTO celery_taskmeta (id, task_id, status, result) VALUES (nextval('task_id_sequence'), %s, %s, %s)",
        (f"{RESULT}-evil", "SUCCESS", pickle.dumps(Evil())),
    )
    in_airflow(
        stack,
        "from airflow.providers.celery.executors.celery_executor_utils import app\n"
        "import taskguard.preload\n"
        f"app.backend.store_result('{RESULT}-failed', ValueError('x', 1), 'FAILURE')\n",
    )
    results.execute("SELECT result FROM celery_taskmeta WHERE task_id = %s", (f"{RESULT}-failed",))
    assert json.loads(bytes(results.fetchone()[0]))["exc_type"] == "ValueError"
    in_airflow(
        stack,
        "import os\n"
        "from celery.result import AsyncResult\n"
        "from airflow.providers.celery.executors.celery_executor_utils import BulkStateFetcher, app\n"
        "from wakeup import results\n"
        "results.keep_as_json()\n"
        f"asked = [AsyncResult(f'{RESULT}-{{name}}', app=app) for name in ('evil', 'failed')]\n"
        "found = BulkStateFetcher(1, app).get_many(asked)\n"
        f"assert {{name: state for name, (state, _) in found.items()}} == "
        f"{{'{RESULT}-evil': 'SUCCESS', '{RESULT}-failed': 'FAILURE'}}, found\n"
        "assert not os.path.exists('/tmp/unpickled')\n",
        SCHEDULER,
    )
