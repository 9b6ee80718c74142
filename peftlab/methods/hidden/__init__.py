"""Hidden states: representations of chosen tokens are edited."""
