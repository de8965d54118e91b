"""Task groups: which tasks belong together (HoME, arXiv 2408.05430)."""

from collections.abc import Mapping, Sequence

from smes.schema import Schema

_WATCH_WORDS = ("view", "watch", "play")


def check_groups(ranker: str, groups: Mapping[str, Sequence[str]]) -> dict[str, tuple[str, ...]]:
    """The groups as a configuration keeps them: lists, as JSON and YAML have them, become tuples.

    Args:
        ranker: Whose configuration, for the message.
        groups: Names of tasks by the name of their group.

    Raises:
        ValueError: A group without a task, or a task named twice.
    """
    named = [name for names in groups.values() for name in names]
    if len(set(named)) < len(named) or not all(groups.values()):
        raise ValueError(f"{ranker}.groups: {dict(groups)}, expected at least one task in each and no task twice")
    return {group: tuple(names) for group, names in groups.items()}


def task_groups(ranker: str, schema: Schema, groups: Mapping[str, Sequence[str]]) -> tuple[int, ...]:
    """The group of each task, numbered from 0 in the order in which tasks first name them.

    Args:
        ranker: Whose configuration, for the message.
        schema: Its tasks.
        groups: Names of tasks by the name of their group; tasks named in none form, together, one more. Empty: HoME's
            two, ``watch`` (regression tasks, and those with ``view``, ``watch`` or ``play`` in their name) and
            ``interaction`` (the rest).

    Raises:
        ValueError: A group names a task that the schema does not have.
    """
    tasks = {task.name for task in schema.tasks}
    of_task = {name: group for group, names in groups.items() for name in names}
    if unknown := sorted(of_task.keys() - tasks):
        raise ValueError(f"{ranker}.groups: unknown tasks {unknown}, expected names among {sorted(tasks)}")
    if not groups:
        of_task = {
            task.name: "watch"
            for task in schema.tasks
            if task.kind == "regression" or any(word in task.name for word in _WATCH_WORDS)
        }
    named = [of_task.get(task.name) for task in schema.tasks]
    numbers = {group: number for number, group in enumerate(dict.fromkeys(named))}
    return tuple(numbers[group] for group in named)
