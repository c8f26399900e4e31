"""The operations: validation, autograd and dispatch, one file each. Importing them registers every operator."""

from cem_fast.ops import backend as backend
from cem_fast.ops import vmap as vmap
