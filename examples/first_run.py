"""Your first run: parameters, a metric over steps, a text, a figure and a model, logged to MLflow.

From outside the stack, with nothing but `pip install mlflow` and three variables that
`make env` prints. `make first-run` does it all. The digits' data ships with scikit-learn.
"""

from __future__ import annotations

import os
import sys

import matplotlib as mpl

mpl.use("Agg")

import matplotlib.pyplot as plt
import mlflow
import sklearn
from mlflow.models import infer_signature
from sklearn.datasets import load_digits
from sklearn.metrics import ConfusionMatrixDisplay, accuracy_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

EXPERIMENT = "first-run"
PARAMETERS = {"hidden_layer_sizes": 32, "learning_rate_init": 0.005, "batch_size": 64}
EPOCHS = 20
SEED = 7


def main() -> int:
    """Trains a small neural network on handwritten digits and logs it."""
    if "MLFLOW_TRACKING_URI" not in os.environ:
        print('MLFLOW_TRACKING_URI is not set: eval "$(make --silent env)" in the clone, then again', file=sys.stderr)
        return 2
    pixels, digit = load_digits(return_X_y=True, as_frame=True)
    x_train, x_test, y_train, y_test = train_test_split(pixels, digit, test_size=0.3, random_state=SEED, stratify=digit)

    experiment = mlflow.set_experiment(EXPERIMENT)
    with mlflow.start_run() as run:
        mlflow.log_params({**PARAMETERS, "epochs": EPOCHS})

        model = MLPClassifier(**PARAMETERS, random_state=SEED)
        for step in range(EPOCHS):
            model.partial_fit(x_train, y_train, classes=range(10))
            metrics = {
                "train_loss": model.loss_,
                "test_loss": log_loss(y_test, model.predict_proba(x_test)),
                "test_accuracy": accuracy_score(y_test, model.predict(x_test)),
            }
            mlflow.log_metrics(metrics, step=step)

        mlflow.log_text(f"{len(x_train)} images to train on, {len(x_test)} to test with\n", "data.txt")
        figure, axes = plt.subplots(figsize=(6, 6))
        ConfusionMatrixDisplay.from_predictions(y_test, model.predict(x_test), ax=axes, colorbar=False)
        mlflow.log_figure(figure, "confusion.png")
        mlflow.sklearn.log_model(
            model,
            name="model",
            signature=infer_signature(x_train, model.predict(x_train)),
            # The model file may hold this type besides plain data; loading it runs no other code.
            skops_trusted_types=["sklearn.neural_network._stochastic_optimizers.AdamOptimizer"],
            # Named here: to find them out, MLflow would load the model once more in a process of its own.
            pip_requirements=[f"scikit-learn=={sklearn.__version__}"],
        )

    where = f"{os.environ['MLFLOW_TRACKING_URI']}/#/experiments/{experiment.experiment_id}"
    print(f"test_accuracy {metrics['test_accuracy']:.3f}")
    print(f"run       {where}/runs/{run.info.run_id}")
    print(f"compare   {where}   (change PARAMETERS in examples/first_run.py, and run it again)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
