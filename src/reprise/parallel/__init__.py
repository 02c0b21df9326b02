"""One model on several processes: a leader that schedules, and followers that do as it says."""

from reprise.parallel.leader import Leader as Leader
from reprise.parallel.leader import LeadingRunner as LeadingRunner
from reprise.parallel.lockstep import Lockstep as Lockstep
from reprise.parallel.lockstep import Wish as Wish
from reprise.parallel.remote import Elsewhere as Elsewhere
from reprise.parallel.seat import Seat as Seat
from reprise.parallel.seat import SharedSeat as SharedSeat
