"""What a method would cost on given devices, what fits there and what to choose: `fedlean plan`."""

from fedlean.planning.plan import Plan as Plan
from fedlean.planning.plan import plan as plan
