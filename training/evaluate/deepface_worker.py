"""Runs in an interpreter of its own that has `deepface` (and TensorFlow): face distances of pairs of pictures.

Standard input: one JSON object per line, `{"id", "picture", "reference", "networks"}` with two paths. Standard output:
first `{"deepface": version}`, then per line `{"id", "distances": {network: 1 - cosine}}`, or `{"id", "missed": reason}`
where deepface finds no face. deepface's own defaults otherwise: detector opencv, aligned, normalisation base.
"""

from __future__ import annotations

import json
import sys
from importlib.metadata import version


def main() -> None:
    """Answers until the input ends."""
    answers = sys.stdout
    sys.stdout = sys.stderr  # what deepface and TensorFlow print must not come between the answers
    del sys.path[0]  # this folder: its modules must not stand in for libraries of the same name
    from deepface import DeepFace

    answers.write(json.dumps({"deepface": version("deepface")}) + "\n")
    answers.flush()
    for line in sys.stdin:
        pair = json.loads(line)
        try:
            distances = {
                network: DeepFace.verify(
                    pair["picture"], pair["reference"], model_name=network, distance_metric="cosine"
                )["distance"]
                for network in pair["networks"]
            }
            answer = {"id": pair["id"], "distances": {name: float(value) for name, value in distances.items()}}
        except ValueError as error:  # deepface's way to say that a picture shows no face
            answer = {"id": pair["id"], "missed": str(error).splitlines()[0]}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
