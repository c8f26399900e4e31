"""The choice of a number of components by an information criterion, and its picture."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from cem_fast._support import optional

if TYPE_CHECKING:
    from cem_fast.mixture.model import GaussianMixture

CRITERIA = ("bic", "aic")


@dataclass(frozen=True)
class Selection:
    """The criterion of every number of components that ``GaussianMixture.select`` tried; the lowest value is chosen.

    Example:
        >>> from cem_fast.mixture.selection import Selection
        >>> Selection("bic", {1: 30.0, 2: 10.0, 3: 20.0}).chosen
        2
    """

    criterion: str
    values: dict[int, float]

    @property
    def chosen(self) -> int:
        """The number of components with the lowest criterion."""
        return min(self.values, key=lambda number: self.values[number])

    def plot(self, axes: Any = None) -> Any:
        """Draws the criterion over the number of components, with the chosen one marked; needs matplotlib.

        Args:
            axes: matplotlib axes to draw on; new ones if None.

        Returns:
            The axes; ``axes.figure.savefig(path)`` writes the picture.

        Example:
            >>> from cem_fast.mixture.selection import Selection
            >>> axes = Selection("bic", {1: 30.0, 2: 10.0, 3: 20.0}).plot()
            >>> axes.get_ylabel()
            'BIC'
        """
        if axes is None:
            axes = optional.load("matplotlib.figure", "plot", "matplotlib").Figure(layout="constrained").subplots()
        axes.plot(list(self.values), list(self.values.values()), marker="o")
        axes.plot(self.chosen, self.values[self.chosen], marker="o", markersize=12, fillstyle="none")
        axes.set(xlabel="components", ylabel=self.criterion.upper(), xticks=list(self.values))
        return axes


def validate_selection(mixture: GaussianMixture, num_components: Iterable[int], criterion: str) -> list[int]:
    """The numbers of components to try.

    Raises:
        ValueError: there are none, the criterion is another one, or initial parameters fix the number.
    """
    numbers = list(num_components)
    if not numbers:
        raise ValueError("num_components must hold at least one number of components, got none")
    if criterion not in CRITERIA:
        raise ValueError(f"criterion must be one of {', '.join(CRITERIA)}, got {criterion!r}")
    if any(isinstance(part, Tensor) for part in (mixture.init, mixture.init_variances, mixture.init_weights)):
        raise ValueError(
            "select needs init='k-means++' or 'random', got initial parameters of one number of components"
        )
    return numbers
