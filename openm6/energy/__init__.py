"""Energy: counters of the devices, a declared estimate if there are none, and what the joules were used for."""
