"""What the fleet is deployed with: configuration as data, and the stack on one machine."""
