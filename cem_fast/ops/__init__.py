"""Operations: validation, autograd and dispatch. Importing this package registers every operator with torch."""

from cem_fast.ops import backend as backend
from cem_fast.ops import fits as fits
from cem_fast.ops import vmap as vmap
