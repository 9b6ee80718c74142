"""Files of adapters: our own format (header, fingerprint, save, load), and models merged on disk."""
