"""An agent outside the fleet, to run as it is or to begin one's own with."""
