"""Gaussian mixtures in files and as scikit-learn models."""

from __future__ import annotations

from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from cem_fast.mixture import interchange
from cem_fast.mixture.density import MixtureDensity

M = TypeVar("M", bound="ExchangedMixture")

# stored in a file next to the parameters
SETTINGS = ("num_components", "num_classes", "covariance_type", "algorithm", "num_init", "max_iter", "tol", "reg_covar")
INITIAL = ("init", "init_variances", "init_weights")
FITTED = ("num_rows_", "n_iter_", "converged_", "lower_bound_")


class ExchangedMixture(MixtureDensity):
    """The part of a ``GaussianMixture`` that reads and writes it in other formats."""

    reg_covar: float
    num_rows_: int
    n_iter_: int
    converged_: bool
    lower_bound_: float

    def save(self, path: str | Path) -> None:
        """Writes the mixture to a safetensors file, which ``GaussianMixture.load`` reads.

        The file holds parameters, settings and results of the last fit, but no generator or process group.

        Raises:
            OSError: the file cannot be written.

        Example:
            >>> import tempfile, torch
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]]))
            >>> with tempfile.TemporaryDirectory() as folder:
            ...     mixture.save(f"{folder}/mixture.safetensors")
            ...     GaussianMixture.load(f"{folder}/mixture.safetensors").means
            tensor([[[2.]]])
        """
        initial = {name: getattr(self, name) for name in INITIAL}
        tensors = {f"settings.{name}": value for name, value in initial.items() if isinstance(value, Tensor)}
        values = {name: getattr(self, name) for name in SETTINGS + FITTED}
        interchange.write(path, {**self.state_dict(), **tensors}, values)

    @classmethod
    def load(cls: type[M], path: str | Path) -> M:
        """Reads a mixture that ``save`` wrote; see there for an example.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file holds no mixture.
        """
        state, values = interchange.read(path)
        initial: dict[str, Any] = {
            name: state.pop(f"settings.{name}") for name in INITIAL if f"settings.{name}" in state
        }
        try:
            # files of version 0.1 lack some of the settings and all results of the fit
            settings = {name: values[name] for name in SETTINGS if name in values}
            interchange.require_parameters(state, settings.get("num_classes", 1), settings["num_components"])
            mixture = cls(**settings, **initial).to(state["means"].dtype)
            mixture.load_state_dict(state)
            for name in (name for name in FITTED if name in values):
                kind = type(getattr(mixture, name))
                if type(values[name]) is not kind:
                    raise TypeError(f"{name} must be of type {kind.__name__}, got {type(values[name]).__name__}")
                setattr(mixture, name, values[name])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"path must be a file that GaussianMixture.save wrote, got {path}: {error}") from error
        return mixture

    def require_class(self, class_index: int) -> None:
        """Requires a fitted mixture that has this class.

        Raises:
            RuntimeError: the mixture is not fitted.
            ValueError: there is no such class.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]])).require_class(1)
            Traceback (most recent call last):
            ValueError: class_index must lie in [0, 1), got 1
        """
        self._components(None)
        if not 0 <= class_index < self.num_classes:
            raise ValueError(f"class_index must lie in [0, {self.num_classes}), got {class_index}")

    def to_sklearn(self, class_index: int = 0) -> Any:
        """Converts the mixture of one class to a fitted ``sklearn.mixture.GaussianMixture``; needs scikit-learn.

        Raises:
            RuntimeError: the mixture is not fitted.
            ValueError: there is no such class.

        Example:
            >>> import torch
            >>> from cem_fast import GaussianMixture
            >>> GaussianMixture(num_components=1).fit(torch.tensor([[1.0], [3.0]])).to_sklearn().means_
            array([[2.]])
        """
        self.require_class(class_index)
        model = interchange.to_sklearn(
            *(value[class_index] for value in (self.means, self.spread, self.weights)),
            covariance_type=self.covariance_type,
            reg_covar=self.reg_covar,
        )
        model.converged_, model.n_iter_, model.lower_bound_ = self.converged_, self.n_iter_, self.lower_bound_
        return model

    @classmethod
    def from_sklearn(cls: type[M], model: Any, *, num_rows: int = 0) -> M:
        """Converts a fitted ``sklearn.mixture.GaussianMixture`` to a mixture of one class, in double precision.

        Args:
            model: the scikit-learn model.
            num_rows: number of rows that it was fitted to, which it does not store; ``partial_fit`` needs it.

        Returns:
            The mixture.

        Raises:
            ValueError: the model is not fitted.

        Example:
            >>> from sklearn.mixture import GaussianMixture as SklearnMixture
            >>> from cem_fast import GaussianMixture
            >>> mixture = GaussianMixture.from_sklearn(SklearnMixture(1).fit([[1.0], [3.0]]))
            >>> round(mixture.means.item(), 4)
            2.0
        """
        means, spread, weights = interchange.from_sklearn(model)
        make: Any = cls
        mixture: M = make(
            num_components=model.n_components, covariance_type=model.covariance_type, reg_covar=model.reg_covar
        ).double()
        mixture.set_parameters(
            means=means,
            variances=spread,
            weights=weights,
            class_prior=means.new_ones(1),
            counts=num_rows * weights,
        )
        mixture.n_iter_, mixture.converged_, mixture.num_rows_ = model.n_iter_, model.converged_, num_rows
        mixture.lower_bound_ = float(model.lower_bound_)
        return mixture
