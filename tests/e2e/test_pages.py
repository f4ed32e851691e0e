"""The web pages, in a headless browser, as a person sees them. Screenshots are kept."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from mlflow import MlflowClient
from selenium import webdriver
from selenium.common.exceptions import StaleElementReferenceException
from selenium.webdriver.common.by import By
from selenium.webdriver.support.wait import WebDriverWait

from stack import engine, host
from stack.airflow import Airflow
from tests.e2e.conftest import DAG_ID, MODEL
from tests.support import SCREENSHOTS, StackUnderTest, wait_until

PATIENCE_S = 60


@pytest.fixture(scope="module")
def browser() -> Iterator[webdriver.Chrome]:
    """Headless Chromium with a profile of its own. As root on Debian it is installed where missing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        here = host.read()
        if not here.root or here.os_id != "debian":
            pytest.skip("no chromium and chromedriver on this host (Debian: apt-get install chromium chromium-driver)")
        engine.apt_install("chromium", "chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    for word in (
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-quic",
        "--no-first-run",
        "--disable-sync",
        "--disable-background-networking",
        "--disable-component-update",
        "--disable-dev-shm-usage",
        "--window-size=1400,900",
    ):
        options.add_argument(word)
    driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(shutil.which("chromedriver")))
    driver.set_page_load_timeout(PATIENCE_S)
    yield driver
    driver.quit()


def wait_for_text(browser: webdriver.Chrome, text: str) -> None:
    """Waits until the page shows a text; fails with what it shows instead."""
    try:
        # A page that is being replaced while it is read goes stale: look at the new one.
        wait = WebDriverWait(browser, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException])
        wait.until(lambda page: text in page.find_element(By.TAG_NAME, "body").text)
    except Exception:
        body = browser.find_element(By.TAG_NAME, "body").text
        keep(browser, f"failed-{int(time.time())}")
        pytest.fail(f"{browser.current_url} does not show {text!r} but: {body[:800]}")


def keep(browser: webdriver.Chrome, name: str) -> Path:
    """Saves a screenshot."""
    SCREENSHOTS.mkdir(parents=True, exist_ok=True)
    path = SCREENSHOTS / f"{name}.png"
    browser.save_screenshot(os.fspath(path))
    return path


def sign_in(browser: webdriver.Chrome, stack: StackUnderTest, password: str, seen: str) -> None:
    """Fills in Airflow's login form, as somebody who is not signed in yet, and waits for what comes of it."""
    browser.get(f"{stack.airflow_url}/auth/login/")
    browser.delete_all_cookies()
    browser.get(f"{stack.airflow_url}/auth/login/")
    WebDriverWait(browser, PATIENCE_S).until(lambda page: page.find_elements(By.NAME, "username"))
    browser.find_element(By.NAME, "username").send_keys(stack.settings.admin_user)
    browser.find_element(By.NAME, "password").send_keys(password)
    browser.find_element(By.CSS_SELECTOR, "input[type=submit], button[type=submit]").click()
    wait_for_text(browser, seen)


def click(browser: webdriver.Chrome, text: str, within: str = "") -> None:
    """Presses the button of that name, once it can be pressed; `within` is an XPath."""

    def pressed(page: webdriver.Chrome) -> bool:
        for button in page.find_elements(By.XPATH, f"{within}//button[normalize-space()='{text}']"):
            if button.is_displayed() and button.is_enabled():
                button.click()
                return True
        return False

    wait = WebDriverWait(browser, PATIENCE_S, ignored_exceptions=[StaleElementReferenceException])
    wait.until(pressed, f"no button {text!r} on {browser.current_url}")


def test_airflow_pages(browser: webdriver.Chrome, stack: StackUnderTest, airflow: Airflow) -> None:
    """A wrong password is refused, the right one lets in, and the shipped DAG is listed."""
    airflow.wait_for_dag("train_model")
    sign_in(browser, stack, "wrong", "Invalid login")
    sign_in(browser, stack, stack.secret("admin_password"), "Dags")
    browser.get(f"{stack.airflow_url}/dags")
    wait_for_text(browser, "train_model")
    keep(browser, "airflow-dags")
    browser.get(f"{stack.airflow_url}/dags/train_model")
    wait_for_text(browser, "train_model")
    keep(browser, "airflow-train-model")


def test_mlflow_pages(browser: webdriver.Chrome, stack: StackUnderTest, finished: dict[str, Any]) -> None:
    """With the login MLflow shows the experiment and the pipeline's runs; without, nothing."""
    browser.get(stack.mlflow_url)
    assert "train_model" not in browser.find_element(By.TAG_NAME, "body").text
    login = f"{quote(stack.settings.admin_user)}:{quote(stack.secret('admin_password'))}"
    browser.get(stack.mlflow_url.replace("//", f"//{login}@"))
    browser.get(f"{stack.mlflow_url}/#/experiments")
    wait_for_text(browser, "train_model")
    keep(browser, "mlflow-experiments")
    browser.get(f"{stack.mlflow_url}/#/experiments/{finished['experiment_id']}/runs")
    wait_for_text(browser, "neural-network")
    keep(browser, "mlflow-runs")


def test_two_runs_are_compared(
    browser: webdriver.Chrome, stack: StackUnderTest, tracking: MlflowClient, finished: dict[str, Any]
) -> None:
    """MLflow's page shows two of the pipeline's candidates side by side, with what they differ in."""
    query = f"tags.`airflow.run_id` = '{finished['run_id']}'"
    runs = tracking.search_runs([finished["experiment_id"]], query, max_results=2)
    ids, names = ([one.info.run_id for one in runs], [str(one.info.run_name) for one in runs])
    words = f"runs={quote(json.dumps(ids))}&experiments={quote(json.dumps([finished['experiment_id']]))}"
    browser.get(f"{stack.mlflow_url}/#/compare-runs?{words}")
    wait_for_text(browser, "Comparing 2 Runs")
    for text in (*names, "accuracy_score"):
        wait_for_text(browser, text)
    keep(browser, "mlflow-compare")


def test_a_model_is_approved(
    browser: webdriver.Chrome, stack: StackUnderTest, airflow: Airflow, tracking: MlflowClient, finished: dict[str, Any]
) -> None:
    """The run is asked for in the form with the parameters, as it opens. Then in Airflow's page of the waiting task, by
    its button; and the model is champion."""
    assert finished["version"]

    def runs() -> set[str]:
        return {run["dag_run_id"] for run in airflow.runs(DAG_ID)}

    before = runs()
    sign_in(browser, stack, stack.secret("admin_password"), "Dags")
    browser.get(f"{stack.airflow_url}/dags/{DAG_ID}")
    click(browser, "Trigger")
    for text in ("approval_minutes", "How long to wait for a person."):
        wait_for_text(browser, text)
    keep(browser, "airflow-parameters")
    click(browser, "Trigger", within="//*[@role='dialog']")
    wait_until(lambda: bool(runs() - before), PATIENCE_S, "the run is there")
    (run_id,) = runs() - before
    wait_until(
        lambda: any(one["state"] == "awaiting_input" for one in airflow.task_instances(DAG_ID, run_id)),
        300,
        "the run asks for approval",
    )
    browser.get(f"{stack.airflow_url}/dags/{DAG_ID}/runs/{quote(run_id)}/tasks/approve/required_actions")
    wait_for_text(browser, "Deploy a new model?")
    keep(browser, "airflow-approval")
    click(browser, "Approve")
    assert airflow.follow(DAG_ID, run_id, patience=120) == "success"
    champion = tracking.get_model_version_by_alias(MODEL, "champion")
    assert champion.version == airflow.xcom(DAG_ID, run_id, "register")["version"]
