"""Who used which joules: what the meter counts while the engine works is split by the time spent on each request."""

from __future__ import annotations

from openm6.base.energy.meter import Meter
from openm6.serve.ticket import Ticket


class EnergyShares:
    """Splits the meter's growth over tickets by the engine's seconds; what is counted while it rests is nobody's."""

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.read = meter.joules()
        self.seconds: dict[Ticket, float] = {}
        self.idle = 0.0
        self.shared = 0.0

    def spent(self, tickets: list[Ticket], seconds: float) -> None:
        """So long was worked on these tickets together."""
        for ticket in tickets:
            self.seconds[ticket] = self.seconds.get(ticket, 0.0) + seconds / len(tickets)

    def settle(self) -> None:
        """Gives out what was counted since the last time, to the last joule."""
        grown = self._grown()
        total = sum(self.seconds.values())
        if not total:
            self.idle += grown
            return
        for ticket, seconds in self.seconds.items():
            ticket.joules += grown * seconds / total
        self.shared += grown
        self.seconds.clear()

    def _grown(self) -> float:
        reading = self.meter.joules(fresh=True)
        grown = reading.joules - self.read.joules
        self.read = reading
        return grown

    @property
    def source(self) -> str:
        """By what kind of counter."""
        return self.read.source
