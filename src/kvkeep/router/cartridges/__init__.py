"""Requests that name a cartridge: which one, where it is resident, and what engines are told."""
