"""Units hidden where filtered random noise is highest (ColorMAE, Hinojosa et al. 2024, section 3)."""

from __future__ import annotations

import numpy as np

from mpp.objective.interfaces import Mask
from mpp.recipe.values import NonNegativeFloat, PositiveFloat, PositiveInt, Ratio


class NoiseMask(Mask):
    """Hide patches in clusters of similar size, spread over the whole image.

    White noise is blurred, and a stronger blur of the same noise is subtracted. What remains is green noise, with which
    ColorMAE was best. The units with the highest values are hidden. `coarse_sigma: null` gives red noise, in large
    clusters; `fine_sigma: 0` gives blue noise, in single units. ColorMAE cuts windows from noise that it stores. Here
    every sample has noise of its own, which wraps around the edges, so that each unit is hidden equally often.

    Args:
        ratio: Fraction of the units to hide, exact after rounding (ColorMAE: 0.75). A range [a, b] is drawn for each
            batch.
        fine_sigma: Standard deviation of the blur in units, which removes finer structure (a guess).
        coarse_sigma: Standard deviation of the blur in units that is subtracted, which removes coarser structure (a
            guess).
        unit_px: Side of a mask unit in pixels. Default: the encoder's stride.
    """

    def __init__(
        self,
        *,
        ratio: Ratio = 0.75,
        fine_sigma: NonNegativeFloat = 0.5,
        coarse_sigma: PositiveFloat | None = 2.0,
        unit_px: PositiveInt | None = None,
    ) -> None:
        if coarse_sigma is not None and coarse_sigma <= fine_sigma:
            raise ValueError(f"coarse_sigma: must be above fine_sigma, {fine_sigma}; got {coarse_sigma}")
        self.ratio, self.fine_sigma, self.coarse_sigma, self.unit_px = ratio, fine_sigma, coarse_sigma, unit_px

    def __call__(self, grid: tuple[int, int], count: int, rng: np.random.Generator) -> np.ndarray:
        rows, columns = (np.fft.fftfreq(n) for n in grid)
        squared_frequency = rows[:, None] ** 2 + columns**2  # in cycles per unit

        def blur(sigma: float) -> np.ndarray:
            """Return the spectrum of a Gaussian kernel."""
            spectrum: np.ndarray = np.exp(-2 * (np.pi * sigma) ** 2 * squared_frequency)
            return spectrum

        kept = blur(self.fine_sigma) - (0.0 if self.coarse_sigma is None else blur(self.coarse_sigma))
        kept[0, 0] = 0.0  # the mean, beside which the rest of a strong blur would be lost by rounding
        noise = np.fft.ifft2(np.fft.fft2(rng.standard_normal(grid)) * kept).real
        mask = np.zeros(noise.size, dtype=bool)
        mask[np.argsort(noise, axis=None, kind="stable")[noise.size - count :]] = True
        return mask.reshape(grid)
