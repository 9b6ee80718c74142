"""What happens to adapters afterwards: switch, merge, route, take off."""
