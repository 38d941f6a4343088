"""Graphs whose loops are Scans or regions: found, exchanged, differentiated, linked."""
