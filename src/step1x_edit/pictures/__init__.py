"""Pictures: bytes to pixels and back, with the metadata that must survive an edit."""
