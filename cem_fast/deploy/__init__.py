"""The device half on the device, the cloud half in the cloud, and noise that stays noise."""

from __future__ import annotations

from cem_fast.deploy.client import DeviceClient
from cem_fast.deploy.export import export, export_run
from cem_fast.deploy.manifest import Manifest
from cem_fast.deploy.server import CloudServer
from cem_fast.deploy.verify import verify

__all__ = ["CloudServer", "DeviceClient", "Manifest", "export", "export_run", "verify"]
