"""Versions that another process loads, for an application that answers."""

from functools import partial

from prometheus_client import generate_latest

from smes_scorer.arms import NO_ARMS, Arm, with_arms
from smes_scorer.config import ArmConfig
from smes_scorer.first_answers import FirstAnswers
from smes_scorer.processes.figures import AllFigures, merged_refusals
from smes_scorer.processes.follower import Follower, Following, ToldFirstAnswers, WorkerPlace
from smes_scorer.source import Open, Source, Wanted
from smes_scorer.telemetry import Telemetry


class FollowedArm(Arm):
    """An arm whose versions another process loads; arguments as of :class:`smes_scorer.arms.Arm`."""

    def __init__(
        self, name: str, config: ArmConfig, swap: Follower, first_answers: FirstAnswers, telemetry: Telemetry
    ) -> None:
        super().__init__(name, config, swap, first_answers, telemetry)
        self._following = swap

    @property
    def is_ready(self) -> bool:
        """As :attr:`smes_scorer.arms.Arm.is_ready`."""
        return self.swap.served is not None and self._following.holds


def followed(place: WorkerPlace) -> Open:
    """Versions that the loader of a service gives to one of its processes."""
    return partial(_followed, place)


def _followed(place: WorkerPlace, wanted: Wanted) -> Source:
    telemetry, schema = wanted.telemetry, wanted.schema
    main = Follower(0, schema, telemetry, on_schema=wanted.on_schema, on_served=wanted.on_served)
    arms, followers = [], [main]
    for track, (name, arm_config) in enumerate(wanted.config.arms.items(), start=1):
        own = Telemetry()
        follower = Follower(track, schema, own, on_schema=wanted.on_schema)
        followers.append(follower)
        arms.append(FollowedArm(name, arm_config, follower, ToldFirstAnswers(place.loader, track), own))
    all_figures = AllFigures(place, telemetry)
    following = Following(place, followers, all_figures.own)
    beside = with_arms(tuple(arms), wanted.config, wanted.interfaces, telemetry) if arms else NO_ARMS
    return Source(
        swap=main,
        arms=beside,
        first_answers=ToldFirstAnswers(place.loader, 0),
        runs=(following, beside),
        clients=(),
        alive=lambda: following.alive,
        loads=lambda: following.loads,
        damage=lambda: 0,
        problems=lambda: following.problems,
        refused=lambda: merged_refusals(main.status.refused if main.status else {}, telemetry.refused.summary()),
        summary=all_figures.summary,
        metrics=lambda: generate_latest(all_figures.registry),
    )
