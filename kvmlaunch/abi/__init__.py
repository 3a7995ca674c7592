"""Pure formats of the SEV-SNP launch: bytes <-> values.

| module          | format                                                               |
|-----------------|----------------------------------------------------------------------|
| `page`          | page size and launch page types                                      |
| `digest`        | PAGE_INFO chain, launch digest, digest text                          |
| `defaults`      | the policy where nobody chose one                                    |
| `policy`        | guest policy word                                                    |
| `fwstatus`      | firmware status codes: name, text, advice                            |
| `segment`       | segment register inside the VMSA                                     |
| `vmsa`          | VMSA page: fields, encode, decode, diff                              |
| `reset`         | reset states that are measured (QEMU, untouched KVM), vCPU signature |
| `kvm_sync`      | what KVM makes of a wanted VMSA in `sync` mode                       |
| `cpuid_page`    | CPUID page                                                           |
| `secrets_page`  | secrets page                                                         |
| `kernel_hashes` | table of kernel, initrd and command line hashes that OVMF checks      |
| `idblock`       | ID block and ID authentication information                           |
| `idblock_sign`  | their signing and checking, and public keys                          |
| `signature`     | ECDSA P-384 signature as firmware encodes it                         |
| `tcb`           | TCB_VERSION of each product                                          |
| `report`        | attestation report                                                   |
| `guest_message` | messages between guest and firmware: header, encryption              |
| `guest_payload` | the payloads of these messages                                       |
| `blob`          | small structures as raw bytes, hex or base64                         |
| `cert_table`    | certificate table of an extended guest request                       |
| `record`        | not a format: frozen records, as dataclasses makes them              |
| `enums`         | nor is this: enumerations, as enum makes them                        |

Nothing here opens files, reads a clock or needs the extension; bad input raises
`kvmlaunch.errors.FormatError`. Numbers are those of AMD 56860 (SEV-SNP firmware ABI)
and of the APM; each module quotes its table. All integers are little-endian.
"""

from __future__ import annotations

__all__: list[str] = []
