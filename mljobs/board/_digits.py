"""What the demonstration trains for real: a network on the digits that come with scikit-learn, epoch by epoch."""

from __future__ import annotations

import random
import threading
from typing import Any

import numpy as np
from sklearn.datasets import load_digits
from sklearn.metrics import f1_score, log_loss
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

from mljobs.store._run import Run

TARGET = "digits"


def spec(rnd: random.Random) -> dict[str, Any]:
    """Return parameters."""
    return {
        "model": "MLPClassifier",
        "hidden": rnd.choice([8, 16, 32, 64]),
        "lr": rnd.choice([0.0003, 0.001, 0.003, 0.01, 0.03]),
        "alpha": rnd.choice([0.0, 0.0001, 0.01]),
        "epochs": 40,
    }


def train(run: Run, stop: threading.Event) -> None:
    """Train, with a pause after each epoch so that one can watch."""
    digits, given = load_digits(), run.spec
    train_x, test_x, train_y, test_y = train_test_split(
        digits.data / 16, digits.target, test_size=0.3, random_state=7, stratify=digits.target
    )
    model = MLPClassifier((given["hidden"],), learning_rate_init=given["lr"], alpha=given["alpha"], random_state=7)
    classes = np.unique(digits.target)
    for _ in run.track(range(given["epochs"])):
        model.partial_fit(train_x, train_y, classes=classes)
        predicted = model.predict(test_x)
        run.report(
            f1=round(float(f1_score(test_y, predicted, average="macro")), 4),
            accuracy=round(float((predicted == test_y).mean()), 4),
            loss=round(float(log_loss(test_y, model.predict_proba(test_x))), 4),
        )
        if stop.wait(0.5):
            break
