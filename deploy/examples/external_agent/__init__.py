"""An agent outside the fleet, to run as it is or to use as the base of another."""
