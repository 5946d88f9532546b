"""The stages of a run as boxes in columns, each right of its inputs, for an SVG."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from orchestrator.pipeline.stage import Stage
from orchestrator.reporting.status import StatusRow

BOX_WIDTH, BOX_HEIGHT, GAP_X, GAP_Y = 150, 46, 26, 12
"""SVG units."""

MAX_BOXES = 8
"""With more experts, they share one box that has a cell for each."""

CELL, CELLS_PER_ROW = 14, 9
"""Size of a cell, and cells beside each other."""


@dataclass(slots=True, kw_only=True)
class Box:
    """A stage, or many experts."""

    name: str
    rows: list[StatusRow]
    x: float = 0.0
    y: float = 0.0
    inputs: set[str] = field(default_factory=set)
    """Names of the boxes that it reads."""

    @property
    def height(self) -> float:
        """Return the height in SVG units."""
        return BOX_HEIGHT if len(self.rows) == 1 else 30 + CELL * -(-len(self.rows) // CELLS_PER_ROW)

    @property
    def state(self) -> str:
        """Return the state that its stages share, or that which needs attention most."""
        words = [row.state.partition(" ")[0] for row in self.rows]
        order = ("failed", "lost", "unreachable", "running", "waiting", "finished")
        return min(words, key=lambda word: order.index(word) if word in order else 0)

    @property
    def share(self) -> float:
        """Return the share of the work that is done."""
        return sum(map(done_share, self.rows)) / len(self.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class Drawing:
    """Boxes and the lines between them, with the size of the picture in SVG units."""

    boxes: list[Box]
    lines: list[str]
    """Paths from the right of an input to the left of a box."""
    width: float
    height: float


def done_share(row: StatusRow) -> float:
    """Return the share of a stage's work that is done; 0 if it is not known."""
    if row.state == "finished":
        return 1.0
    progress = row.progress
    return min(1.0, progress.done / progress.total) if progress and progress.total else 0.0


def draw_graph(graph: Sequence[Stage], rows: Sequence[StatusRow]) -> Drawing:
    """Place the stages of a graph in columns by the longest way from the data set."""
    status = {row.name: row for row in rows}
    experts = [stage.name for stage in graph if stage.kind == "expert"]
    label = f"{len(experts)} experts"
    names = {stage.name: label if stage.name in experts and len(experts) > MAX_BOXES else stage.name for stage in graph}
    boxes: dict[str, Box] = {}
    columns: dict[str, int] = {}
    for stage in graph:
        box = boxes.setdefault(names[stage.name], Box(name=names[stage.name], rows=[]))
        box.rows.append(status[stage.name])
        box.inputs |= {names[source.stage.name] for source in stage.inputs.values()}
        columns[box.name] = max([columns.get(box.name, 0), *(columns[name] + 1 for name in box.inputs)])
    height = _place(boxes, columns)
    width = (max(columns.values(), default=0) + 1) * (BOX_WIDTH + GAP_X) - GAP_X
    direct = [(boxes[name], box) for box in boxes.values() for name in _nearest(box, boxes)]
    return Drawing(boxes=list(boxes.values()), lines=[_line(a, b) for a, b in direct], width=width, height=height)


def _place(boxes: Mapping[str, Box], columns: Mapping[str, int]) -> float:
    """Set the places of the boxes, every column centred, and return the height of the highest."""
    stacks = {
        column: [box for name, box in boxes.items() if columns[name] == column] for column in set(columns.values())
    }
    heights = {column: sum(box.height for box in stack) + GAP_Y * (len(stack) - 1) for column, stack in stacks.items()}
    highest = max(heights.values(), default=0.0)
    for column, stack in stacks.items():
        y = (highest - heights[column]) / 2
        for box in stack:
            box.x, box.y = column * (BOX_WIDTH + GAP_X), y
            y += box.height + GAP_Y
    return highest


def _nearest(box: Box, boxes: Mapping[str, Box]) -> set[str]:
    """Return the inputs of a box without those that another input reads: the lines of these would say it twice."""
    behind: set[str] = set()
    todo = [boxes[name] for name in box.inputs]
    while todo:
        further = todo.pop().inputs - behind
        behind |= further
        todo += [boxes[name] for name in further]
    return box.inputs - behind


def _line(source: Box, target: Box) -> str:
    x0, y0 = source.x + BOX_WIDTH, source.y + source.height / 2
    x1, y1 = target.x, target.y + target.height / 2
    middle = x1 - GAP_X / 2
    return (
        f"M{x0:.0f} {y0:.1f} H{middle - GAP_X / 4:.0f} C{middle:.0f} {y0:.1f} {middle:.0f} {y1:.1f} {x1:.0f} {y1:.1f}"
    )
