"""Ranks: what each of several processes owns, how they sum tensors and how they agree.

Layers know a :class:`Group` and nothing else; ops find the communicator by the group's name.
"""

from reprise.distributed.agreement import ALONE_AGREES as ALONE_AGREES
from reprise.distributed.agreement import Agreement as Agreement
from reprise.distributed.agreement import require_same as require_same
from reprise.distributed.communicator import Communicator as Communicator
from reprise.distributed.communicator import communicator as communicator
from reprise.distributed.communicator import reached as reached
from reprise.distributed.group import ALONE as ALONE
from reprise.distributed.group import ECHO as ECHO
from reprise.distributed.group import Group as Group
from reprise.distributed.group import Host as Host
from reprise.distributed.group import Share as Share
from reprise.distributed.group import own_experts as own_experts
from reprise.distributed.ranks import Ranks as Ranks
