"""Success matrices for tests."""

import numpy as np

from perennial.evaluation.success_matrix import SuccessMatrix

#                 trained         held out
HAND_MADE = [
    [0.1, 0.2, 0.3, 0.4, 0.6],  # base
    [0.8, 0.3, 0.3, 0.5, 0.5],
    [0.7, 0.9, 0.6, 0.4, 0.4],
    [0.6, 0.8, 1.0, 0.2, 0.4],
]


def matrix_of_rates(rates, trained, episodes=10):
    """The first `rates * episodes` states of each cell succeed; NaN leaves the cell out."""
    names = [f"task{column}" for column in range(len(rates[0]))]
    rows = tuple(
        {
            name: np.arange(episodes) < round(rate * episodes)
            for name, rate in zip(names, row, strict=True)
            if rate == rate
        }
        for row in rates
    )
    return SuccessMatrix(tuple(names[:trained]), tuple(names[trained:]), rows)


def simulated(probabilities, trained, episodes, rng, shared=0.6):
    """Independent tasks; each episode keeps its state's luck with probability `shared`, so that rows are alike."""
    probabilities = np.asarray(probabilities)
    names = [f"task{column}" for column in range(probabilities.shape[1])]
    luck = rng.random((len(names), episodes))
    rows = []
    for row in probabilities:
        own = rng.random(luck.shape)
        used = np.where(rng.random(luck.shape) < shared, luck, own)
        rows.append({name: used[column] < row[column] for column, name in enumerate(names)})
    return SuccessMatrix(tuple(names[:trained]), tuple(names[trained:]), tuple(rows))
