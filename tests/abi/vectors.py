"""Known answers, typed from the project's fact sheets.

Source, unless an entry says otherwise: shared/reference/snp-firmware-abi.md, section 1.4
(launch digests), 3.2 (VMSA pages), 6.5 B (ID block) and kernel-snp-abi.md appendix B
(offsets). The sheet computed them with an independent script (hashlib and struct). Entries
with "x" gave the same value with sev-snp-measure's gctx module (8f2b337), entries with "g"
are published in gce-tcb-verifier's unit tests (74582c0), the others have one source.
"""

from __future__ import annotations

# ruff: noqa: E501 - a digest has 96 digits

ZEROS = bytes(4096)
COUNTING = bytes(range(256)) * 16
ONES = b"\xff" * 4096
LGTM = b"LGTM" * 4
LGTM_PAGES = (LGTM + bytes(4080), ZEROS, bytes(4080) + LGTM)
VMSA_GPA = 0xFFFFFFFFF000

PAGE_HASHES = {
    ZEROS: "c0e59a3e3ffbd3b5c75428fb36432facabc745944296ff515f737c4fef4efc64586809f7a16f56354a1eaecf2aa8d774",
    COUNTING: "166f9617070665894eb30e3968ee7642d7fd459089bee2ccae3aa4ae1b658eb53e2780a0b9e10ae5efe7ed112be3bf59",
    ONES: "9761a6cc8f381514125bd5461b11a17a721703fb2179ddf15348b6276b47fe93bbca565060bdb425c99cae93fbd68d84",
}

# name: (page type, GPA, page or None, launch digest); each starts from zeros.
SINGLE_PAGE = {
    "V1": (
        1,
        0x0,
        ZEROS,
        "9d13634b6014bb21cf059b2dc694e7bff01a8a7137041100cd2b695f3d10fb687267b97808b27f8f471d943bc6f53a20",
    ),  # x
    "V2": (
        1,
        0x1000,
        COUNTING,
        "d9ee416942ec5db1caf25b01cff7feaed0d7ac42422f811c6164e4857e3f800d270202f572ade105c96b3959107b8521",
    ),  # x
    "V3": (
        3,
        0x0,
        None,
        "70c0ecaab9608f14ebf8ac6f0f07bcd8728f4e2ab30382b539b4de4de904ca9f8ebdf4b2cd3cd84dd996bd55dd794676",
    ),  # x
    "V4": (
        3,
        0x1000,
        None,
        "4bd4147976a1e7554c1c778a781affc1c672f1965a727ba16084989b7e356044a28bbe585a2f75dac9356fa5ab78f061",
    ),  # x
    "V5": (
        4,
        0x2000,
        None,
        "cc5aed6a06f63b38d24155dfa38e924c44b41d2339bc8a7d3cb1995e67607e8889a81c2d42e75bb95627b40e344b8929",
    ),  # x
    "V6": (
        5,
        0x3000,
        None,
        "56a257bb27ff6656e6b6bc227e34e6bbce81bf7ccdf961c680295369708e4df280fa28220ab7c554ef7cf24fabb86504",
    ),  # x
    "V7": (
        6,
        0x4000,
        None,
        "0acb0f4e9aa7ba97447f36f5cdf321a2f5b0682d1b57467571bde89f1920df24d03f18bd3c20e27400e0fdae40d02d92",
    ),  # x
    "V8": (
        2,
        VMSA_GPA,
        ZEROS,
        "f4577da9b848673216afc3909e5ea7aa80150dda441526874cd2b0282894709b46484c13a07221aefbedfff667199259",
    ),  # x
    "V10": (
        1,
        0xFFFFF000,
        ZEROS,
        "46c510442a54cc32344cef32e14dc3d6312fc4a010780dd11fd33204df5550590356b069e6c6ca5bbfca71561f370399",
    ),  # x
    "V11": (
        1,
        0x1000000000,
        ZEROS,
        "adcff33d920fdb5f443618f8333fdf575326defc5250596cf736190e377cc0b11ec0cc1c4dfdafca28592bbaed7d678f",
    ),  # x
    "V19": (
        2,
        0xFFFFFFFFFF000,
        ZEROS,
        "e92283852e61997727fabba1c921b02541b5d2e7f49a54f06058b4dd80c64d554d20130715583b6753a21c0fff3851e2",
    ),  # -
}

# V9: a VMSA with bytes 0x2F0..0x2FF not zero, hashed as given (x).
V9_AS_GIVEN = "6b06359b6dabc4d2cfceafaae61da56d98524d57bcba4c6a3efe4e32d896f11d80f7e572b03ae66b0eee13c90f366932"
# The same with the bytes taken as zero, as firmware does; one source: hashlib and struct.
V9_FIRMWARE_CONTENTS = "4e5a60e7887e601668fab3a569204461b755836f8418c29b3802b4dc7a32bca70a92efe3ac0bc76023ad787f2a322436"
V9_FIRMWARE = "6f08497b60c35de58af81054d13dd7d83c22454ec4e7205994521df4c1cf119fb772c00e0dc3a4547dc54528f95e40f4"

# V12: (page type, ((GPA, page), ...), digest after the step); one chain (x).
V12_STEPS = {
    "a": (
        1,
        ((0xFFFFE000, COUNTING), (0xFFFFF000, ONES)),
        "195c1cee41527522a7692f7178051578b6c0cafe7e24442343d321ca82c01a9fc9d567fe4ceff03026d2050283ff007a",
    ),
    "b": (
        3,
        ((0x800000, None), (0x801000, None)),
        "8f32e02a5a662ca97b1f866621c244014c5a90bbd1bfa82ccb34e8e7385610fab87bea648c54b33ea59ec0fd22871f5d",
    ),
    "c": (
        5,
        ((0x80D000, None),),
        "593d5f4fb787aa5736c59390b4265a8f89f432a8c2ee9d11328fbb8c710d17fe0708dc78eee3a13bdef68ac5df96b4b1",
    ),
    "d": (
        6,
        ((0x80E000, None),),
        "352308817e6729865d60ac84d011e98e6c747437e526c86046f70e7e4162e6f05fbe2bdd367134bfeca58c60f97ec2f6",
    ),
    "e": (
        4,
        ((0x900000, None),),
        "4d5fea9258a643217d43cb534af5660c051b0444b600ba7b2420cd8cfca633212ecc30a7d90d4c0595a285dfcd48dd9f",
    ),
    "f": (
        2,
        ((VMSA_GPA, ZEROS),),
        "c76502c188b3699446212093e8fc18a09f0f476b63f5f15a4f7d2901d89a0bafcc3bf4567e0e91971f72d23a985098ed",
    ),
}

# NORMAL zeros at 0 with (IMI_PAGE, VMPL1..3): no second source, byte order of 1.1.
IMI_AND_VMPL = {
    "V13": (
        True,
        (0, 0, 0),
        "1fab3a3e1957a929164e9e6a110d492289b6b45c08841d75ebd79ab28631ec33b33234af3a6c857967a55543af09dc6d",
    ),
    "V14": (
        False,
        (15, 0, 0),
        "9574f94bce92056288ad211ce014f393d5a9822ba34b5981a14503718abe5564f5bbcb389ef5bbe70da22990ba0cc762",
    ),
    "V15": (
        False,
        (0, 0, 1),
        "bfdd0f52aa2ae0d844ae5e2a37cb3ac5bbf117cdd0fbb9f77cd90f4ad9e6dd7814449705320ba9ad149e80700a46f349",
    ),
    "V16": (
        False,
        (15, 3, 1),
        "113f3016280394f88f6032595b95396c5bb25d3f37596dcee79bd474ab3259ead8ba3a856afdafa2dbc0aabcf19059b8",
    ),
}
V16_TAIL = "70000100000f03010000000000000000"

# name: (page type, first GPA, pages, digest)
RANGES = {
    "V17": (
        1,
        0x200000,
        (ZEROS,) * 512,
        "d6b9a916f116fab05cb1aec1c3c0bde4eaca07c0384bb94002ebacc58422cfbcf9a34dba18df1f28e20b5a0c4819c313",
    ),
    "V18": (
        3,
        0x200000,
        (None,) * 512,
        "486f227165b308e323ee24622225b050f2478d61d45cfca44fb031f4eabdbe6d8400a1afa6b5dfbcfceb70f317a47856",
    ),
    "V21": (
        1,
        0x0,
        LGTM_PAGES,
        "cba1cd767c33b30f96271837dbbae4081a945464a5af397b9b0336b5d8759ee88cc6b62c05d915c4424a9ac5747437d4",
    ),  # g
    "V22": (
        3,
        0x9000,
        (None,) * 3,
        "4bfe18477ba370a50329da74b9621e721c4f29663176e08fbcf088a17c1bc45f133898b86d5082acbe202a6e9419808a",
    ),  # g
}

# V20, a minimal guest: (page type, GPA, page, digest); the VMSA is milan_bsp (x).
V20_PAGES = (
    (
        1,
        0xFFFFF000,
        COUNTING,
        "79d7e453f7b541d04f7f51cccc6f4acca624b7a97430595dd7c98bd8c7a897656a91c611473f137680bd00e9e72e47c4",
    ),
    (
        5,
        0x80D000,
        None,
        "6224a11dd5d0cadc2a60dbaa380df6f7c435401229738968752ed28637ff35cbc94763ab801f0304619436037ac9b304",
    ),
    (
        6,
        0x80E000,
        None,
        "8c838d44027cf80826e12aa1b6f38a4247af70d815363fd7361babb1e271abc51821026b291f9d48551eeed6441ec4d1",
    ),
)
V20_WITH_VMSA = "f346d8b9a336ee896c6bd741d21e4ef029b99a2440d1c2e1208034bc9cbca7c1671500e0bc0d00757e9157258f5fc3a7"

# SHA-384 of VMSA pages, equal to those of sev-snp-measure 0.0.13:
# name: (EIP, signature, SEV_FEATURES, hash)
QEMU_VMSAS = {
    "epyc_v4_bsp": (
        0xFFFFFFF0,
        0x800F12,
        0x1,
        "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a",
    ),
    "epyc_v4_ap": (
        0x80B004,
        0x800F12,
        0x1,
        "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4",
    ),
    "rome_bsp": (
        0xFFFFFFF0,
        0x830F10,
        0x1,
        "34f43cbd622a2c18c3e042a6d30358628c35d97690fb5d3566644b45b26f7c907c7c20b959a53c74eb6e47414e68bb78",
    ),
    "milan_bsp": (
        0xFFFFFFF0,
        0xA00F11,
        0x1,
        "728af287318db5f3fc4d2357a969483c4225956dc555b514a78d64ee372112d13b3dca8afd02cdbd1c55697d8ce087f5",
    ),
    "genoa_bsp": (
        0xFFFFFFF0,
        0xA10F10,
        0x1,
        "7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719e5ce72ad660a022def56b15e5e0f899e",
    ),
    "turin_bsp": (
        0xFFFFFFF0,
        0xB00F00,
        0x1,
        "49ddacf0393b6d9401ac505250ec615e923bc580ff6ce0a0b4c5f2e261b0a972cd4facec381e17ad503ce64f4de8a83e",
    ),
    "epyc_v4_bsp_feat21": (
        0xFFFFFFF0,
        0x800F12,
        0x21,
        "ae79efa6efbe1594a2717dfd42af495a0e4ed37b00e529a5fdf349bea04c3513962ffb0c74cf65b0d9a1857271833d6e",
    ),
}
# EC2 (0.0.13) BSP: an untouched KVM vCPU after an SREGS round trip, without FPU state.
EC2_BSP = "d08442e8bcdb6a5dcd7f22e4f7fd6979beffb9f0bb54a9d1977407fe84f482abf23c1baae6ce95a6a9e7a94c3c51f412"

# virtee/sev tests/id-block.rs.
ID_BLOCK_LD = "a14d638341e5674628fe1e02fbedebe5e5ab4faf1dd72d8966068e615bb99efd13d214b35c231715b38e263dc6059745"
ID_BLOCK_BASE64 = (
    "oU1jg0HlZ0Yo/h4C++3r5eWrT68d1y2JZgaOYVu5nv0T0hSzXCMXFbOOJj3GBZdF"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAwAAAAAA"
)
# sev-snp-measure tests/test_id_block.py.
SSM_ID_BLOCK_LD_BASE64 = "B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7t"
SSM_ID_BLOCK_BASE64 = (
    "B28FLQi9p6cAqipgjFyqawDrrSl7bWioWkWx5mmlWLZ+G5HShKMB/mPE+gdQRn7t"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAABAAAAAAAAAAAAAwAAAAAA"
)

# struct sev_es_save_area of Linux 6.12, compiled: offset, size, field (no reserved ones).
SEV_ES_SAVE_AREA = (
    (0x000, 16, "es"),
    (0x010, 16, "cs"),
    (0x020, 16, "ss"),
    (0x030, 16, "ds"),
    (0x040, 16, "fs"),
    (0x050, 16, "gs"),
    (0x060, 16, "gdtr"),
    (0x070, 16, "ldtr"),
    (0x080, 16, "idtr"),
    (0x090, 16, "tr"),
    (0x0A0, 8, "pl0_ssp"),
    (0x0A8, 8, "pl1_ssp"),
    (0x0B0, 8, "pl2_ssp"),
    (0x0B8, 8, "pl3_ssp"),
    (0x0C0, 8, "u_cet"),
    (0x0CA, 1, "vmpl"),
    (0x0CB, 1, "cpl"),
    (0x0D0, 8, "efer"),
    (0x140, 8, "xss"),
    (0x148, 8, "cr4"),
    (0x150, 8, "cr3"),
    (0x158, 8, "cr0"),
    (0x160, 8, "dr7"),
    (0x168, 8, "dr6"),
    (0x170, 8, "rflags"),
    (0x178, 8, "rip"),
    (0x180, 8, "dr0"),
    (0x188, 8, "dr1"),
    (0x190, 8, "dr2"),
    (0x198, 8, "dr3"),
    (0x1A0, 8, "dr0_addr_mask"),
    (0x1A8, 8, "dr1_addr_mask"),
    (0x1B0, 8, "dr2_addr_mask"),
    (0x1B8, 8, "dr3_addr_mask"),
    (0x1D8, 8, "rsp"),
    (0x1E0, 8, "s_cet"),
    (0x1E8, 8, "ssp"),
    (0x1F0, 8, "isst_addr"),
    (0x1F8, 8, "rax"),
    (0x200, 8, "star"),
    (0x208, 8, "lstar"),
    (0x210, 8, "cstar"),
    (0x218, 8, "sfmask"),
    (0x220, 8, "kernel_gs_base"),
    (0x228, 8, "sysenter_cs"),
    (0x230, 8, "sysenter_esp"),
    (0x238, 8, "sysenter_eip"),
    (0x240, 8, "cr2"),
    (0x268, 8, "g_pat"),
    (0x270, 8, "dbgctl"),
    (0x278, 8, "br_from"),
    (0x280, 8, "br_to"),
    (0x288, 8, "last_excp_from"),
    (0x290, 8, "last_excp_to"),
    (0x2E8, 4, "pkru"),
    (0x2EC, 4, "tsc_aux"),
    (0x308, 8, "rcx"),
    (0x310, 8, "rdx"),
    (0x318, 8, "rbx"),
    (0x328, 8, "rbp"),
    (0x330, 8, "rsi"),
    (0x338, 8, "rdi"),
    (0x340, 8, "r8"),
    (0x348, 8, "r9"),
    (0x350, 8, "r10"),
    (0x358, 8, "r11"),
    (0x360, 8, "r12"),
    (0x368, 8, "r13"),
    (0x370, 8, "r14"),
    (0x378, 8, "r15"),
    (0x390, 8, "guest_exit_info_1"),
    (0x398, 8, "guest_exit_info_2"),
    (0x3A0, 8, "guest_exit_int_info"),
    (0x3A8, 8, "guest_nrip"),
    (0x3B0, 8, "sev_features"),
    (0x3B8, 8, "vintr_ctrl"),
    (0x3C0, 8, "guest_exit_code"),
    (0x3C8, 8, "virtual_tom"),
    (0x3D0, 8, "tlb_id"),
    (0x3D8, 8, "pcpu_id"),
    (0x3E0, 8, "event_inj"),
    (0x3E8, 8, "xcr0"),
    (0x400, 8, "x87_dp"),
    (0x408, 4, "mxcsr"),
    (0x40C, 2, "x87_ftw"),
    (0x40E, 2, "x87_fsw"),
    (0x410, 2, "x87_fcw"),
    (0x412, 2, "x87_fop"),
    (0x414, 2, "x87_ds"),
    (0x416, 2, "x87_cs"),
    (0x418, 8, "x87_rip"),
    (0x420, 80, "fpreg_x87"),
    (0x470, 256, "fpreg_xmm"),
    (0x570, 256, "fpreg_ymm"),
)

# virtee/sev tests/measurement at 9cf2adb: public halves of test_id_key.pem and
# test_auth_key.pem, (R, S) of test_id_sig.bin and test_auth_sig.bin (48 bytes each, little-endian),
# and SHA-384 of test_auth_block.bin.
VS_ID_KEY_PEM = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAE9nY+TSYJzxss8i8syLjKTPVdRww8I1Us
k7Foh0OQ3ZXLP97oR933n/Ke+7iAPG0fzNeo0Ee5zcHHULEZCr5tHa03qN7LFDJ7
dmYZ9xJgfP0NOIU8UNqbzQgLNTick74+
-----END PUBLIC KEY-----
"""
VS_AUTHOR_KEY_PEM = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEYnDHi9aQTNEzYpmiW5hzanHOkv7wdJTX
LLKLBzyDD59WSvelwcb/xaNJc9XaRYaMhjx5MKLJhEinehAIgQLiqV+TCM0+VrVZ
t/06zIizzCoZd0NI/qLyyQMRkeBxh6z1
-----END PUBLIC KEY-----
"""
VS_ID_BLOCK_SIG = (
    "e5d3bf7d9bf9e061bd4e8f7c6acae05909a9c3c69f04f318f0135eae71ff7d05ef5c8c6b1bc8c047613a7b6f01b738da",
    "d4194dca67de8381ec6d267c032b03dd3c1f5eafa6aa61e92964e5548bef332b1ae921f26de16ac33b642744d197a5d8",
)
VS_ID_KEY_SIG = (
    "bb887b94557f568689ff4855c3f7ed99810c3d54ecd429651134dc18dd020ecaa771a34cb97666771aa31f0eb462ea99",
    "f261e8b95da71b2a35425f48a219a77dbb0fee252f64d18ce99888b9fb4f70b104011b7dfea3e0349371a2bfaf6f9133",
)
VS_ID_AUTH_SHA384 = "711cf8a939ffd9776b762c9b49f2667883dd84b058c9bcd9a27283feee71a2c80f6dd5824acacad350ef0508cae17702"
VS_ID_KEY_DIGEST = "59fb2c686dfa4fef49f38339aa775c90051c28d57383ddc3baf3b5eb4b1496df3b0dbbdcbae5fe27677a644820773fe2"
VS_AUTHOR_KEY_DIGEST = "eed81169fb0cb5e0ec34794f128fd4e0c4a46f67c65a1adfa81fcb24bcc088c272369b7ffc3eb2b6af6a4284a1b36c5f"
# sev-snp-measure tests/keyfile at 8f2b337, public halves; the digests are those of its test_id_block.py.
SSM_ID_KEY_PEM = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEsg/RocK9K2UYOnbiOQrIBfbY5eKvcl5a
jpPPh+wCn51F6zJrBLkr63FOFPqYb4qaLJSguKswzHY1JnWUSHaJHpVP9u9YJqYj
G6bW1/br+2jOMw4eWTlO+3CAiD3caTZL
-----END PUBLIC KEY-----
"""
SSM_AUTHOR_KEY_PEM = b"""-----BEGIN PUBLIC KEY-----
MHYwEAYHKoZIzj0CAQYFK4EEACIDYgAEBoEfxiQJvy2a5RwHQjJU2JPGwj+/Fkrz
ODsPgTpifmFo2QZ6f0vZeZBYjBhBEhCgMrQgoiZW0nHc/U4lZoxy/Vi7X2hR/kcv
nRYPiAsU30w2IwaJYs3k1gjnNzQtqRLJ
-----END PUBLIC KEY-----
"""
SSM_ID_KEY_DIGEST = "870b7e35c53f8a72d0d322f75ab2af8262792aaf6579622ce4131c3f21f289e77cb0560a5e3b90b3932e674ec709cb14"
SSM_AUTHOR_KEY_DIGEST = "63111c34bbfc0a4938f9a009bd074980d8172323e61599c9fd336da8673248e1dca98d0be8f76376a106b8afd4c0a057"
