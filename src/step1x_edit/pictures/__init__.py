"""Pictures: bytes to pixels and back, with what must survive an edit."""
