"""What a collective costs, by the alpha-beta model: bytes of every rank on each kind of link, and seconds.

A cluster is nodes of GPUs. Inside a node every GPU has a link to every other; across nodes every GPU has a network
adapter. A link has a bandwidth (bytes/s of one GPU, one direction), a latency (s of one message that the next one
waits for) and a gap (s that one more message costs where none waits for another: posting it, one request on the wire).

A group is ``ranks`` of which ``per_node`` share a node: the data-parallel group of 32 GPUs under tensor parallelism of
2 has 16 ranks, 4 a node. Every function takes the bytes of the whole buffer that one rank starts from, or ends with:

    ring            reduce-scatter, or all-gather; each of ``per_node`` rings leaves the node by another adapter
    tree            all-reduce of a few numbers: a chain inside the node, a binary tree across
    flat            all-to-all: every rank sends every other its part
    forwarded       all-to-all in two hops: inside the node to the GPU that shares the receiver's place, then across;
                    what arrives is what the flat form brings, in fewer and larger messages
    summed          the same two hops with a sum at the node's edge, so that a node sends one part and not ``per_node``

The phases of one call use different links, so of many calls in a row one phase runs beside another's: :func:`repeated`.
Left out: what several groups do to each other on one link, contention in the network's core, kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Link:
    """One GPU's way out: inside its node, or across nodes."""

    bandwidth: float
    latency_s: float
    gap_s: float


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Both kinds of link, and GPUs a node."""

    node: int
    inside: Link
    across: Link


@dataclass(frozen=True, kw_only=True)
class Group:
    """``ranks``, ``per_node`` of them on each node that has any."""

    ranks: int
    per_node: int

    def __post_init__(self) -> None:
        if self.ranks < 1 or self.per_node < 1 or self.ranks % self.per_node:
            raise ValueError(
                f"a group fills its nodes evenly, got {self.ranks} ranks, {self.per_node} a node; choose a multiple"
            )

    @property
    def nodes(self) -> int:
        return self.ranks // self.per_node


@dataclass(frozen=True, kw_only=True)
class Phase:
    """What one rank sends on one kind of link, or on both at once, and how long it takes."""

    seconds: float
    inside_bytes: float = 0.0
    across_bytes: float = 0.0
    messages: int = 0


@dataclass(frozen=True)
class Cost:
    """The phases of one collective, each waiting for the one before."""

    phases: tuple[Phase, ...]

    @property
    def seconds(self) -> float:
        return sum(phase.seconds for phase in self.phases)

    @property
    def inside_bytes(self) -> float:
        return sum(phase.inside_bytes for phase in self.phases)

    @property
    def across_bytes(self) -> float:
        return sum(phase.across_bytes for phase in self.phases)

    @property
    def messages(self) -> int:
        return sum(phase.messages for phase in self.phases)


def repeated(cost: Cost, times: int) -> float:
    """Seconds of ``times`` calls in a row, each phase of one beside the other phases of its neighbours."""
    if times == 0 or not cost.phases:
        return 0.0
    return cost.seconds + (times - 1) * max(phase.seconds for phase in cost.phases)


def joined(first: Cost, second: Cost) -> Cost:
    """Two collectives of one bucket, one after the other: phase by phase on the same links."""
    longer, shorter = sorted((first.phases, second.phases), key=len, reverse=True)
    pairs = [
        Phase(
            seconds=a.seconds + b.seconds,
            inside_bytes=a.inside_bytes + b.inside_bytes,
            across_bytes=a.across_bytes + b.across_bytes,
            messages=a.messages + b.messages,
        )
        for a, b in zip(longer, shorter)
    ]
    return Cost((*pairs, *longer[len(pairs) :]))


def _on(link: Link, sent: float, messages: int) -> float:
    """Seconds of ``messages`` that do not wait for each other."""
    return link.latency_s + (messages - 1) * link.gap_s + sent / link.bandwidth if messages else 0.0


def ring(cluster: Cluster, group: Group, buffer: float) -> Cost:
    """A reduce-scatter or an all-gather: ranks - 1 dependent steps, one part of the buffer each.

    Of a rank's neighbours in the ``per_node`` rings one is across and the others inside.
    """
    if group.ranks == 1:
        return Cost(())
    sent = buffer * (group.ranks - 1) / group.ranks
    across = 0.0 if group.nodes == 1 else sent / group.per_node
    steps_across = 0 if group.nodes == 1 else group.nodes - 1
    latency = steps_across * cluster.across.latency_s + (group.ranks - 1 - steps_across) * cluster.inside.latency_s
    seconds = latency + max((sent - across) / cluster.inside.bandwidth, across / cluster.across.bandwidth)
    phase = Phase(seconds=seconds, inside_bytes=sent - across, across_bytes=across, messages=group.ranks - 1)
    return Cost((phase,))


def tree(cluster: Cluster, group: Group, buffer: float) -> Cost:
    """An all-reduce: up and down a chain inside the node and a binary tree across; bytes of the mean rank."""
    if group.ranks == 1:
        return Cost(())
    inside = 2 * buffer * (group.per_node - 1) / group.per_node
    across = 2 * buffer * (group.nodes - 1) / group.ranks
    depth = math.ceil(math.log2(group.nodes))
    latency = 2 * (depth * cluster.across.latency_s + (group.per_node - 1) * cluster.inside.latency_s)
    transfer = 2 * buffer * ((group.per_node > 1) / cluster.inside.bandwidth + (depth > 0) / cluster.across.bandwidth)
    phase = Phase(seconds=latency + transfer, inside_bytes=inside, across_bytes=across, messages=2)
    return Cost((phase,))


def flat(cluster: Cluster, group: Group, buffer: float) -> Cost:
    """An all-to-all in one hop: inside and across at once, the slower decides."""
    part = buffer / group.ranks
    peers_inside, peers_across = group.per_node - 1, group.ranks - group.per_node
    if group.ranks == 1:
        return Cost(())
    seconds = max(
        _on(cluster.inside, part * peers_inside, peers_inside), _on(cluster.across, part * peers_across, peers_across)
    )
    phase = Phase(
        seconds=seconds,
        inside_bytes=part * peers_inside,
        across_bytes=part * peers_across,
        messages=peers_inside + peers_across,
    )
    return Cost((phase,))


def forwarded(cluster: Cluster, group: Group, buffer: float) -> Cost:
    """An all-to-all in two hops that leaves every byte as it is: as many bytes across as the flat form, in
    nodes - 1 messages instead of ranks - per_node."""
    return _two_hops(cluster, group, buffer, buffer)


def summed(cluster: Cluster, group: Group, buffer: float, partial: float) -> Cost:
    """A reduce-scatter in two hops with a sum between them; ``partial`` is the buffer's size as partial sums travel.

    With one rank a node there is nothing to sum before its edge, and the buffer travels as it is.
    """
    return _two_hops(cluster, group, buffer, partial / group.per_node if group.per_node > 1 else buffer)


def _two_hops(cluster: Cluster, group: Group, inside: float, across: float) -> Cost:
    phases = []
    if group.per_node > 1:
        sent, messages = inside * (group.per_node - 1) / group.per_node, group.per_node - 1
        phases.append(Phase(seconds=_on(cluster.inside, sent, messages), inside_bytes=sent, messages=messages))
    if group.nodes > 1:
        sent, messages = across * (group.nodes - 1) / group.nodes, group.nodes - 1
        phases.append(Phase(seconds=_on(cluster.across, sent, messages), across_bytes=sent, messages=messages))
    return Cost(tuple(phases))
