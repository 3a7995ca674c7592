"""Attestation reports: find one, show it, and check it against certificates and expectations."""
