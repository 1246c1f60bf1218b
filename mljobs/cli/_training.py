"""A real training job to watch: a linear classifier on the digits that come with scikit-learn, epoch by epoch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SPEC = {"model": "SGDClassifier", "loss": "log_loss", "alpha": 0.0005, "epochs": 30, "test_share": 0.25, "seed": 7}
TARGET = "digits"


@dataclass(frozen=True, slots=True)
class Epoch:
    """What one pass over the training data brought.

    Attributes:
        number: From 1.
        loss: Cross-entropy on the held-out digits.
        accuracy: Share of the held-out digits named rightly.
    """

    number: int
    loss: float
    accuracy: float


class Training:
    """Train as ``spec`` says; iterate over the epochs, then ask for the metrics.

    Args:
        spec: As ``SPEC``.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        from sklearn.datasets import load_digits  # noqa: PLC0415 - the extra is needed only here
        from sklearn.linear_model import SGDClassifier  # noqa: PLC0415
        from sklearn.model_selection import train_test_split  # noqa: PLC0415

        self._epochs: int = spec["epochs"]
        digits = load_digits()
        self._train_x, self._test_x, self._train_y, self._test_y = train_test_split(
            digits.data / 16.0,
            digits.target,
            test_size=spec["test_share"],
            random_state=spec["seed"],
            stratify=digits.target,
        )
        self._classes = sorted(set(digits.target.tolist()))
        self._model = SGDClassifier(loss=spec["loss"], alpha=spec["alpha"], random_state=spec["seed"])

    def __len__(self) -> int:
        return self._epochs

    def __iter__(self) -> Iterator[Epoch]:
        from sklearn.metrics import accuracy_score, log_loss  # noqa: PLC0415

        for number in range(1, self._epochs + 1):
            self._model.partial_fit(self._train_x, self._train_y, classes=self._classes)
            loss = log_loss(self._test_y, self._model.predict_proba(self._test_x), labels=self._classes)
            accuracy = accuracy_score(self._test_y, self._model.predict(self._test_x))
            yield Epoch(number, float(loss), float(accuracy))

    def metrics(self) -> dict[str, float | int]:
        """Return what came out, measured on the held-out digits."""
        from sklearn.metrics import accuracy_score, f1_score  # noqa: PLC0415

        predicted = self._model.predict(self._test_x)
        return {
            "accuracy": round(float(accuracy_score(self._test_y, predicted)), 4),
            "f1_macro": round(float(f1_score(self._test_y, predicted, average="macro")), 4),
            "train_rows": len(self._train_y),
            "test_rows": len(self._test_y),
        }
