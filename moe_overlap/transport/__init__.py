"""Bytes between ranks: no routing, no arithmetic."""
