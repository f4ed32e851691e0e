# The table of contents. `make` lists it; every recipe is one line over a program in scripts/.
# STACK_DIR=dir works on another instance than this clone (docs/operate.md).

SHELL := /bin/sh
.DEFAULT_GOAL := help
PYTHON := var/venv/bin/python
LOCK := scripts/requirements.lock
TEST_LOCKS := scripts/requirements.lock tests/requirements.lock
CLIENT := var/client
export PYTHONDONTWRITEBYTECODE = 1

##@ Start and stop
up: venv ## Bring everything up and wait until it is healthy (runs init; safe to repeat)
	@$(PYTHON) scripts/up.py
init: venv ## Check this host, write the plan and the secrets; start nothing
	@$(PYTHON) scripts/init.py
down: venv ## Stop everything; data is kept
	@$(PYTHON) scripts/down.py
restart: venv ## Check and build, then stop and start again; data is kept
	@$(PYTHON) scripts/up.py --restart
clean: venv ## DANGER: stop and delete all data and secrets (asks; unattended: YES=1)
	@$(PYTHON) scripts/down.py --volumes --yes "$(YES)"

##@ Look
status: venv ## Health, memory and CPU of each service
	@$(PYTHON) scripts/status.py
logs: venv ## Follow the logs (S=service for one)
	@$(PYTHON) scripts/compose.py logs --follow --tail 200 $(S)
plan: venv ## Print the memory plan for this host (ARGS="--memory 8g --cpus 4" for another; FROM=observed)
	@$(PYTHON) scripts/plan.py $(if $(FROM),--from $(FROM)) $(if $(filter 1,$(YES)),--yes) $(ARGS)
memory: venv ## What each task was seen to need, and what to give it
	@$(PYTHON) scripts/memory.py $(ARGS)
doctor: venv ## Explain every memory kill, restart, lost worker and full disk of the last day
	@$(PYTHON) scripts/doctor.py $(ARGS)
password: venv ## Print the first login's password
	@$(PYTHON) scripts/password.py

##@ People
user: venv ## A login for a person in Airflow and MLflow (NAME=ada ROLE=user; or viewer, op, admin)
	@$(PYTHON) scripts/user.py add "$(NAME)" --role "$(or $(ROLE),user)"
user-remove: venv ## Remove a person's logins; what they made stays (NAME=ada)
	@$(PYTHON) scripts/user.py remove "$(NAME)"
env: venv ## Print what an MLflow client needs, as export lines
	@$(PYTHON) scripts/env.py

##@ Work
first-run: venv ## Log a first run to MLflow from outside the stack (examples/first_run.py)
	@VENV=$(CLIENT) sh scripts/venv.sh examples/requirements.lock && $(PYTHON) scripts/env.py -- $(CLIENT)/bin/python examples/first_run.py
demo: venv ## Run the training pipeline and follow it
	@$(PYTHON) scripts/demo.py $(ARGS)
upload: venv ## Put a file into the bucket of the pipeline's data (FILE=mine.csv; KEY=its name there)
	@$(PYTHON) scripts/upload.py "$(FILE)" --key "$(KEY)"
predict: venv ## Send rows to the served model (FILE=rows.csv, or .json; by default examples/rows.csv)
	@$(PYTHON) scripts/predict.py "$(or $(FILE),examples/rows.csv)"
demo-drift: venv ## Send shifted rows to the served model, and see the retraining that this triggers
	@$(PYTHON) scripts/demo_drift.py
dag-test: venv ## Run a paused DAG in one process against the stack (DAG=train_model; ARGS="--conf {}")
	@$(PYTHON) scripts/dag_idle.py $(DAG) && $(PYTHON) scripts/compose.py run --rm --no-deps airflow-cli airflow dags test $(DAG) $(ARGS)
dag-lint: venv ## Read each DAG file and say what is wrong with it (ARGS="--strict train_model.py")
	@$(PYTHON) scripts/compose.py run --rm --no-deps airflow-cli dag-lint $(ARGS)
airflow: venv ## Run an Airflow command (ARGS="dags list")
	@$(PYTHON) scripts/compose.py run --rm --no-deps airflow-cli airflow $(ARGS)
shell: venv ## Open a shell in a service (S=airflow-worker)
	@$(PYTHON) scripts/compose.py exec $(or $(S),airflow-worker) bash

##@ Images
build: venv ## Build the images that are due
	@$(PYTHON) scripts/build.py
push: venv ## Push the images to IMAGE_PREFIX
	@$(PYTHON) scripts/build.py --push
lock: venv ## Resolve the requirements again and write the lock files
	@$(PYTHON) scripts/lock.py

##@ Prove
verify: test-venv ## Check the running stack, read-only, in two to four minutes
	@$(PYTHON) -m pytest tests/stack --running -q
test: test-venv ## Everything: static, unit, and a throwaway stack beside the running one
	@$(PYTHON) scripts/build.py && $(PYTHON) -m pytest
storm: venv ## Hungry tasks beside modest ones on the running stack, 20 rounds (ARGS="--rounds 1"); loads it heavily
	@$(PYTHON) scripts/storm.py $(ARGS)
faults: test-venv ## Every fault and the long campaigns, on a throwaway stack (more than an hour)
	@$(PYTHON) scripts/build.py && $(PYTHON) -m pytest tests/faults tests/e2e/test_outages.py -m "long or not long"
bench: test-venv ## This stack beside the official settings, in one run (QUICK=1: only that it runs; ARGS="--rounds 1")
	@$(PYTHON) scripts/build.py && PYTHONPATH=.:scripts $(PYTHON) bench/run.py $(if $(filter 1,$(QUICK)),--quick) $(ARGS)
growth: test-venv ## How cost grows with tasks, history and DAG files, on a stack of its own (about half an hour)
	@$(PYTHON) scripts/build.py && PYTHONPATH=.:scripts $(PYTHON) bench/growth.py $(ARGS)
lint: test-venv ## The static checks alone
	@$(PYTHON) -m pytest tests/static -q

help: ## This list
	@awk 'BEGIN {FS = ":.*## "} /^##@/ {printf "\n%s\n", substr($$0, 5)} /^[a-z-]+:.*## / {printf "  make %-11s %s\n", $$1, $$2}' $(MAKEFILE_LIST)

venv:
	@sh scripts/venv.sh $(LOCK)
test-venv:
	@sh scripts/venv.sh $(TEST_LOCKS)

.PHONY: up init down restart clean status logs plan memory doctor password user user-remove env first-run demo upload predict demo-drift storm faults bench growth dag-test dag-lint airflow shell build push lock verify test lint help venv test-venv
