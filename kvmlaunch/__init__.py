"""Launch, measure, debug and test AMD SEV-SNP guests on Linux/KVM."""
