"""Let a host's firmware decide whether a predicted launch digest is what it measures."""

from __future__ import annotations

from dataclasses import dataclass

from kvmlaunch.images.plan import LaunchPlan
from kvmlaunch.launch.measure import measure
from kvmlaunch.launch.oracle import Answer, Oracle, Reply

__all__ = ["Verdict", "conclude", "verify"]


@dataclass(frozen=True)
class Verdict:
    """What is proven of a predicted launch digest.

    Attributes: ``answer``, ``digest`` (predicted, 48 bytes), ``replies`` that prove it, and
    ``why`` it is unknown, "" otherwise.
    """

    answer: Answer
    digest: bytes
    replies: tuple[Reply, ...]
    why: str = ""

    def __str__(self) -> str:
        text = self.digest.hex()
        if self.answer is Answer.RIGHT:
            return f"confirmed: the firmware measured the predicted launch digest {text}"
        if self.answer is Answer.DIFFERS:
            return f"differs: the firmware measured another launch digest than {text}"
        return f"unknown: {self.why}"


def verify(plan: LaunchPlan, oracle: Oracle) -> Verdict:
    """Ask for the predicted digest. Raises what launching does up to SNP_LAUNCH_FINISH."""
    digest = measure(plan).digest
    return conclude(plan, oracle, oracle.ask(plan, digest))


def conclude(plan: LaunchPlan, oracle: Oracle, reply: Reply) -> Verdict:
    """What follows from the reply about the whole plan.

    "Right" without a signed ID block takes a second launch, with a digest that is wrong on purpose:
    only if that one is refused for the digest was the first one not.
    """
    if reply.answer is Answer.UNKNOWN:
        return Verdict(Answer.UNKNOWN, reply.digest, (reply,), f"not expected: {reply}")
    if reply.answer is Answer.DIFFERS or oracle.signed:
        return Verdict(reply.answer, reply.digest, (reply,))
    control = oracle.ask(plan, _wrong(reply.digest))
    replies = (reply, control)
    if control.answer is Answer.DIFFERS:
        return Verdict(Answer.RIGHT, reply.digest, replies)
    why = f"a wrong digest is not refused as one either: {control}"
    return Verdict(Answer.UNKNOWN, reply.digest, replies, why)


def _wrong(digest: bytes) -> bytes:
    return bytes([digest[0] ^ 1]) + digest[1:]
