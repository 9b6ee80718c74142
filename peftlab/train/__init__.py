"""What happens while adapters train."""
