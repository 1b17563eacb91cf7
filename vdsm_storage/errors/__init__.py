# SPDX-License-Identifier: GPL-2.0-or-later
"""Errors as they cross the wire: a numeric code, and a message that says what to do.

The numbers are the ones that engines know (an unknown number is shown as "unexpected error").
An error is a subclass of AgentError with `code` and `template`; the facts that the template names
are given by keyword and stay readable as attributes:

    raise VolumeDoesNotExist(volume=vol_id, image=img_id, domain=sd_id)

Whoever raises or catches one imports it from here, whichever module has it.
"""

from vdsm_storage.errors.domains import *
from vdsm_storage.errors.general import *
from vdsm_storage.errors.groups import *
from vdsm_storage.errors.leases import *
from vdsm_storage.errors.vms import *
from vdsm_storage.errors.volumes import *
