"""Closed-form linear maps that carry two languages' word vectors into one space.

Sources: Mikolov et al. 2013 (arXiv 1309.4168) for a map between languages, Conneau et al. 2018 (arXiv 1710.04087) for Procrustes, Faruqui
and Dyer 2014 ("Improving vector space word representations using multilingual correlation") for CCA. Imports no torch.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
from collections.abc import Callable

import numpy as np

from tli.runtime.errors import TliError, one_line
from tli.runtime.files import atomic_write, sha256, write_json

MAP_FILE, REPORT_FILE = "map.safetensors", "map.json"
# vectors of source words and of target words, [B, D] each; row i of one translates row i of the other
Sides = tuple[np.ndarray, np.ndarray]


@dataclasses.dataclass(frozen=True)
class LinearMap:
    """Both languages' vectors into a space where translations are near: ``(x - mean) @ matrix`` of each side.

    source_mean, target_mean      float64 [D]
    source_matrix, target_matrix  float64 [D, K]
    """

    source_mean: np.ndarray
    target_mean: np.ndarray
    source_matrix: np.ndarray
    target_matrix: np.ndarray

    def __call__(self, source: np.ndarray, target: np.ndarray) -> Sides:
        return self.of_source(source), self.of_target(target)

    def of_source(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.source_mean) @ self.source_matrix

    def of_target(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.target_mean) @ self.target_matrix

    def behind(self, source: Axes | None, target: Axes | None) -> LinearMap:
        """The map of whole vectors, where this one is of their components along orthogonal axes; None: of whole ones already."""
        sides = [(self.source_mean, self.source_matrix, source), (self.target_mean, self.target_matrix, target)]
        means, matrices = [], []
        for mean, matrix, axes in sides:
            means.append(mean if axes is None else axes.mean + axes.matrix @ mean)
            matrices.append(matrix if axes is None else axes.matrix @ matrix)
        return LinearMap(*means, *matrices)


@dataclasses.dataclass(frozen=True)
class Axes:
    """Orthogonal axes through a mean: ``(x - mean) @ matrix``, of which the columns, float64 [D, K], have unit length."""

    mean: np.ndarray
    matrix: np.ndarray

    def __call__(self, vectors: np.ndarray) -> np.ndarray:
        return (vectors - self.mean) @ self.matrix


@dataclasses.dataclass(frozen=True)
class FittedMap:
    """A map off the disk, with what ``map.json`` says of it: ``config``, ``model``, ``map`` (way, layer, shrinkage), ``baselines``, ..."""

    linear: LinearMap
    report: dict


def save_map(folder: pathlib.Path, linear: LinearMap, report: dict) -> None:
    """Write ``map.safetensors``, fp32 tensors named as the map's fields, and then ``map.json``; each is complete or absent."""
    from safetensors.numpy import save_file

    tensors = {field.name: getattr(linear, field.name).astype(np.float32) for field in dataclasses.fields(linear)}
    with atomic_write(folder / MAP_FILE) as temporary:
        save_file(tensors, temporary)
    write_json(folder / REPORT_FILE, {**report, "sha256": sha256(folder / MAP_FILE)})


def load_map(folder: str | os.PathLike) -> FittedMap:
    """Load a map that ``tli.map`` wrote.

    Raises:
        TliError: a folder without a map, files that cannot be read or do not belong together.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    folder = pathlib.Path(folder).expanduser()
    names = {field.name for field in dataclasses.fields(LinearMap)}
    try:
        report = json.loads((folder / REPORT_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / MAP_FILE)
    except (OSError, ValueError, SafetensorError) as error:
        raise TliError(
            folder,
            f"the folder must hold {MAP_FILE} and {REPORT_FILE}",
            one_line(error),
            "name a folder of tli map, or of an adapter with a map",
        ) from error
    if not isinstance(report, dict) or tensors.keys() != names or report.get("sha256") != sha256(folder / MAP_FILE):
        raise TliError(folder, f"{REPORT_FILE} must speak of the {MAP_FILE} beside it", "another's", "make the map again")
    return FittedMap(LinearMap(**{name: tensor.astype(np.float64) for name, tensor in tensors.items()}), report)


def fit_centred(source: np.ndarray, target: np.ndarray) -> LinearMap:
    """No map, but each language's own mean taken off; vectors of trained pairs, float64 [B, D], as for all that fit."""
    return LinearMap(source.mean(0), target.mean(0), np.eye(source.shape[1]), np.eye(target.shape[1]))


def fit_procrustes(source: np.ndarray, target: np.ndarray) -> LinearMap:
    """The orthogonal matrix Q with the least ``|S Q - T|``, of centred vectors."""
    means = source.mean(0), target.mean(0)
    left, _, right = _svd((source - means[0]).T @ (target - means[1]))
    return LinearMap(*means, left @ right, np.eye(target.shape[1]))


def _svd(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The thin SVD. LAPACK's divide and conquer, the fast one, now and then gives up on a matrix of low rank; QR iteration does not."""
    try:
        return np.linalg.svd(matrix, full_matrices=False)
    except np.linalg.LinAlgError:
        import scipy.linalg

        return scipy.linalg.svd(matrix, full_matrices=False, lapack_driver="gesvd")


def fit_ridge(source: np.ndarray, target: np.ndarray) -> Callable[[float], LinearMap]:
    """For a shrinkage s the matrix W with the least ``|S W - T|² + s·mean(eigenvalues of S'S)·|W|²``, of centred vectors."""
    means = source.mean(0), target.mean(0)
    centred = source - means[0]
    values, vectors = np.linalg.eigh(centred.T @ centred)
    rotated = vectors.T @ (centred.T @ (target - means[1]))

    def at(shrinkage: float) -> LinearMap:
        return LinearMap(*means, vectors @ (rotated / (values + shrinkage * values.mean())[:, None]), np.eye(target.shape[1]))

    return at


def fit_cca(source: np.ndarray, target: np.ndarray) -> Callable[[float], LinearMap]:
    """For a shrinkage s the canonical directions of both sides, each times the root of its correlation.

    Covariances are shrunk towards a multiple of the identity, ``(1 - s)·C + s·mean(eigenvalues of C)·I``, without which as many dimensions
    as pairs would correlate perfectly.
    """
    means = source.mean(0), target.mean(0)
    centred = [side - mean for side, mean in zip((source, target), means)]
    (x_values, x_axes), (y_values, y_axes) = (np.linalg.eigh(side.T @ side / len(side)) for side in centred)
    # along the principal axes a covariance is shrunk, and its root taken, number by number
    cross = x_axes.T @ (centred[0].T @ centred[1]) @ y_axes / len(source)

    def at(shrinkage: float) -> LinearMap:
        x_scale, y_scale = (1 / np.sqrt((1 - shrinkage) * np.maximum(v, 0) + shrinkage * v.mean()) for v in (x_values, y_values))
        left, correlations, right = _svd(x_scale[:, None] * cross * y_scale)
        roots = np.sqrt(correlations)
        return LinearMap(*means, (x_axes * x_scale) @ (left * roots), (y_axes * y_scale) @ (right.T * roots))

    return at
