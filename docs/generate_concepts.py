"""Draw the pictures of docs/concepts.md from exact mixtures of Gaussians and from digits."""

from collections.abc import Callable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from sklearn.cluster import KMeans
from sklearn.datasets import load_digits
from sklearn.decomposition import PCA

FOLDER = Path(__file__).parent / "concepts"
COLORS = ("#2a78d6", "#e07a1f", "#3a9d5d")
MEANS, SHARES, WIDTH = np.array([-2.0, 0.4, 2.2]), np.array([0.5, 0.2, 0.3]), 0.3
STYLE = {"font.size": 8, "svg.hashsalt": "ddm", "axes.spines.top": False, "axes.spines.right": False}


def posterior(x: np.ndarray, t: float) -> np.ndarray:
    """Return p(k | x, t) of the mixture in one dimension, by cluster and point."""
    variance = ((1 - t) * WIDTH) ** 2 + t**2
    likelihood = SHARES[:, None] * np.exp(-((x - (1 - t) * MEANS[:, None]) ** 2) / (2 * variance))
    return likelihood / likelihood.sum(axis=0)


def velocities(x: np.ndarray, t: float) -> np.ndarray:
    """Return the exact velocity of every expert, by cluster and point; t > 0."""
    variance = ((1 - t) * WIDTH) ** 2 + t**2
    slope = (t - (1 - t) * WIDTH**2) / variance
    return slope * (x - (1 - t) * MEANS[:, None]) - MEANS[:, None]


def draw_partition(figure: Figure) -> None:
    """Draw points of three clusters, the fine centroids, and the centroids that they are merged into."""
    rng, axes = np.random.default_rng(0), figure.add_subplot()
    for k, center in enumerate(((0, 0), (3, 1), (1.2, 2.8))):
        points = rng.normal(center, 0.6, (150, 2))
        fine = KMeans(6, n_init=1, random_state=0).fit(points).cluster_centers_
        axes.scatter(*points.T, s=4, color=COLORS[k], alpha=0.5, linewidth=0)
        axes.scatter(*fine.T, s=22, facecolor="white", edgecolor=COLORS[k])
        axes.scatter(*points.mean(axis=0), s=120, marker="*", color=COLORS[k], edgecolor="black", label=f"cluster {k}")
    axes.set(xticks=[], yticks=[], xlabel="features of the images", title="circles: fine centroids, stars: centroids")
    axes.legend(frameon=False)


def draw_experts(figure: Figure) -> None:
    """Draw the trajectories of each expert, from noise to its own cluster."""
    for k, axes in enumerate(figure.subplots(1, 3, sharey=True)):
        draw_paths(axes, lambda x, t, k=k: velocities(x, t)[k], lambda path, k=k: COLORS[k])
        axes.set(title=f"expert {k}", xlabel="t")


def draw_router(figure: Figure) -> None:
    """Draw p(k | x, t): sharp for clean samples, the shares of the clusters for noise."""
    x = np.linspace(-4, 4, 160)
    mixed = np.array([posterior(x, t).T for t in np.linspace(0.02, 1, 80)])
    colors = np.array([matplotlib.colors.to_rgb(color) for color in COLORS])
    axes = figure.add_subplot()
    axes.imshow((mixed @ colors).transpose(1, 0, 2), origin="lower", aspect="auto", extent=(0, 1, -4, 4))
    axes.set(xlabel="t (0 clean, 1 noise)", ylabel="noised sample x", title="p(k | x, t), mixed by color")


def draw_selection(figure: Figure) -> None:
    """Draw the same noise under full and under sticky selection."""
    draws = np.random.default_rng(1).choice(3, 24, p=SHARES)
    left, right = figure.subplots(1, 2, sharey=True)
    draw_paths(left, mixture_velocity, color_of_end)
    draw_paths(right, lambda x, t: velocities(x, t)[draws, np.arange(24)], color_of_end)
    left.set(title="full: all experts at every step", xlabel="t")
    right.set(title="sticky: one expert, drawn once", xlabel="t")


def color_of_end(path: np.ndarray) -> str:
    """Return the color of the cluster in which a trajectory ends."""
    return COLORS[int(np.abs(MEANS - path[-1]).argmin())]


def mixture_velocity(x: np.ndarray, t: float) -> np.ndarray:
    """Return the velocity of the whole mixture."""
    return (posterior(x, t) * velocities(x, t)).sum(axis=0)


def draw_paths(
    axes: Axes, velocity: Callable[[np.ndarray, float], np.ndarray], color: Callable[[np.ndarray], str]
) -> None:
    """Follow 24 samples from noise to clean in 80 Euler steps."""
    times = np.linspace(1, 0.01, 81)
    path = [np.random.default_rng(2).normal(size=24)]
    for now, later in zip(times, times[1:], strict=False):
        path.append(path[-1] + (later - now) * velocity(path[-1], now))
    for one in np.array(path).T:
        axes.plot(times[::4], one[::4], linewidth=0.8, color=color(one))
    axes.set(xlim=(1, 0), ylim=(-3.2, 3.2))


def draw_boxes(axes: Axes, boxes: dict[str, tuple[float, float]], arrows: list[tuple[str, str]]) -> None:
    """Draw named boxes and arrows between them, in a square of ten."""
    frame = {"boxstyle": "round,pad=0.5", "fc": "#eef3fa", "ec": "#555"}
    arrow = {"arrowstyle": "->", "shrinkA": 29, "shrinkB": 29, "color": "#555"}
    for text, place in boxes.items():
        axes.text(*place, text, ha="center", va="center", bbox=frame)
    for source, target in arrows:
        axes.annotate("", boxes[target], boxes[source], arrowprops=arrow)
    axes.set(xlim=(0, 10), ylim=(0, 10))
    axes.axis("off")


def draw_islands(figure: Figure) -> None:
    """Draw the controller, three islands, and that none reaches another."""
    boxes = {
        "controller\nrun folder": (1.4, 5),
        "storage west": (4.6, 8.4),
        "storage east": (4.6, 5),
        "storage north": (4.6, 1.6),
        "island west\nexpert 0": (8, 8.4),
        "island east\nexpert 1": (8, 5),
        "island north\nrouter": (8, 1.6),
    }
    names = list(boxes)
    arrows = [pair for k in (1, 2, 3) for pair in ((names[0], names[k]), (names[k], names[k + 3]))]
    draw_boxes(figure.add_subplot(), boxes, arrows)


def draw_codec(figure: Figure) -> None:
    """Draw a digit and what is left of it in 4, 16 and 40 principal components."""
    images = load_digits().data
    for axes, components in zip(figure.subplots(1, 4), (4, 16, 40, 64), strict=True):
        pca = PCA(components).fit(images)
        axes.imshow(pca.inverse_transform(pca.transform(images[7:8])).reshape(8, 8), cmap="gray_r")
        axes.set(title=f"{components} components" if components < 64 else "64 pixels")
        axes.axis("off")


def draw_compression(figure: Figure) -> None:
    """Draw the stages of a compression in their order."""
    stages = ("ensemble", "distill", "accelerate", "prune", "quantize", "stitch")
    boxes = {name: (0.6 + 1.76 * k, 6) for k, name in enumerate(stages)}
    axes = figure.add_subplot()
    draw_boxes(axes, boxes, list(zip(stages, stages[1:], strict=False)))
    notes = ("", "few steps", "reuse between\nsteps", "fewer layers", "fewer bits", "small and large\nover t")
    for (x, _), note in zip(boxes.values(), notes, strict=True):
        axes.text(x, 2.2, note, ha="center", va="center", color="#555")


PICTURES = {
    "partition": (draw_partition, (4, 3)),
    "experts": (draw_experts, (6.5, 2.2)),
    "router": (draw_router, (4.5, 2.6)),
    "selection": (draw_selection, (6.5, 2.4)),
    "islands": (draw_islands, (5.5, 2.8)),
    "codec": (draw_codec, (6, 1.8)),
    "compression": (draw_compression, (8, 1.5)),
}


def draw_all(folder: Path) -> None:
    """Write every picture as `<name>.svg`, the same bytes every time."""
    folder.mkdir(exist_ok=True)
    for name, (draw, size) in PICTURES.items():
        with plt.rc_context(STYLE):
            figure = plt.figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(folder / f"{name}.svg", metadata={"Date": None})
            plt.close(figure)


if __name__ == "__main__":
    draw_all(FOLDER)
