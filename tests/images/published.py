"""Digests that others publish for the fixtures, from snp-firmware-abi.md, section 2.2.

They stand in the tests of sev-snp-measure 8f2b337 (ec2-rdx0: of virtee/sev 9cf2adb), and the fact
sheet's author got each of them by an independent script. Kernel and initrd are empty files.
"""

from __future__ import annotations

# ruff: noqa: E501 - a digest has 96 digits

AMDSEV, OVMFX64 = "ovmf_AmdSev_suffix.bin", "ovmf_OvmfX64_suffix.bin"
AMDSEV_OLD = "ovmf_AmdSev_old_suffix.bin"
SIGNATURE = 0x800F12  # EPYC-v4
SVSM_VARS_SIZE = 540672

# (image, VMM, vCPUs, features, command line or None without a kernel, launch digest)
SNP = [
    (
        AMDSEV,
        "QEMU",
        1,
        0x21,
        "",
        "329c8ce0972ae52343b64d34a434a86f245dfd74f5ed7aae15d22efc78fb9683632b9b50e4e1d7fa41179ef98a7ef198",
    ),
    (
        AMDSEV,
        "QEMU",
        1,
        0x1,
        "",
        "ddc5224521617a536ee7ce9dd6224d1b58a8d4fda1c741f3ac99fc4bfa04ba6e9fc98646d4a07a9079397fa3852819b5",
    ),
    (
        AMDSEV,
        "QEMU",
        1,
        0x21,
        "console=ttyS0 loglevel=7",
        "803f691094946e42068aaa3a8f9e26a5c89f36f7b73ecfb28c653360fe4b3aba7e534442e7e1e17895dfe778d0228977",
    ),
    (
        AMDSEV,
        "QEMU",
        1,
        0x1,
        "console=ttyS0 loglevel=7",
        "6d287813eb5222d770f75005c664e34c204f385ce832cc2ce7d0d6f354454362f390ef83a92046c042e706363b4b08fa",
    ),
    (
        AMDSEV,
        "QEMU",
        1,
        0x21,
        None,
        "e1e1ca029dd7973ab9513295be68198472dcd4fc834bd9af9b63f6e8a1674dbf281a9278a4a2ebe0eed9f22adbcd0e2b",
    ),
    (
        AMDSEV,
        "QEMU",
        1,
        0x1,
        None,
        "19358ba9a7615534a9a1e2f0dfc29384dcd4dcb7062ff9c6013b26869a5fc6ecabe033c48dd6f6db5d6d76e7c5df632d",
    ),
    (
        AMDSEV,
        "QEMU",
        4,
        0x21,
        "",
        "4953b1fb416fa874980e8442b3706d345926d5f38879134e00813c5d7abcbe78eafe7b422907be0b4698e2414a631942",
    ),
    (
        AMDSEV,
        "QEMU",
        4,
        0x1,
        "",
        "5061fffb019493a903613d56d54b94912a1a2f9e4502385f5c194616753720a92441310ba6c4933de877c36e23046ad5",
    ),
    (
        OVMFX64,
        "QEMU",
        1,
        0x21,
        None,
        "28797ae0afaba4005a81e629acebfb59e6687949d6be44007cd5506823b0dd66f146aaae26ff291eed7b493d8a64c385",
    ),
    (
        OVMFX64,
        "QEMU",
        1,
        0x1,
        None,
        "da0296de8193586a5512078dcd719eccecbd87e2b825ad4148c44f665dc87df21e5b49e21523a9ad993afdb6a30b4005",
    ),
    (
        AMDSEV,
        "ec2",
        1,
        0x21,
        "",
        "0ce9ccc06bab55eebe8abc234f3df6514883977a68a591b71052498ab52b2f1aa415db338033946ef93aa8278c0d67fb",
    ),
    (
        AMDSEV,
        "ec2",
        1,
        0x1,
        "",
        "0883bd0eeb716e65b7b977a321c278d1e51b33b5c655fab985443bbcc65c086b9c15e8a0bd8811050dec7e24964e5056",
    ),
    (
        AMDSEV,
        "ec2-rdx0",
        1,
        0x1,
        "",
        "7d3756157c805bf6adf617064c8552e8c1688fa1c8756f11cbf56ba5d25c9270fb69c0505c1cbe1c5c66c0e34c6ed3be",
    ),
    (
        AMDSEV,
        "ec2-rdx0",
        1,
        0x21,
        "",
        "6ae80856486b1396af8c82a40351d6ed76a20c785e9c7fa4ffa27c22d5d6313b4b3b458cd3c9968e6f89fb5d8450d7a6",
    ),
    (
        AMDSEV,
        "gce",
        1,
        0x1,
        "",
        "5da7106cf14cf46b1725ebab123eb9e53bd46a1e9f400cd0c08e7827b04b688ea8b4e403c8404efed4397ea5d5d0722e",
    ),
    (
        AMDSEV,
        "gce",
        4,
        0x1,
        "",
        "5c5debf100fc339f90276e761ee1f1658d08922c3b20e2a2e6c7a6c3370b2452a15a00eae11886a93d6fd1e7ab81e29d",
    ),
]
FIRMWARE_ONLY = (
    AMDSEV,
    "086e2e9149ebf45abdc3445fba5b2da8270bdbb04094d7a2c37faaa4b24af3aa16aff8c374c2a55c467a50da6d466b74",
)
# vCPUs -> launch digest of svsm_ovmf.fd under svsm.bin, with sev-snp-measure's VMSA (X87_FCW 0).
SVSM = {
    4: "27d154c27b7b359c935e250ec6fee72aa0ae8c1225e3b0e1cf46a9567e938066d7d6f94bbdc4a857818bdb79277a44b2",
    2: "9b94745036aafddf4f7f8b00c7513abb5b7703178cb95aaa57928bd963d68d3bfcb715d6019b9167ee2517b11b0d9be7",
}
# (mode, image, vCPUs, command line or None without a kernel, SHA-256)
LEGACY = [
    ("seves", AMDSEV, 1, "", "13810ae661ea11e2bb205621f582fee268f0367c8f97bc297b7fadef3e12002c"),
    ("seves", AMDSEV, 4, "", "0dccbcaba8e90b261bd0d2e1863a2f9da714768b7b2a19363cd6ae35aa90de91"),
    (
        "sev",
        AMDSEV,
        1,
        "console=ttyS0 loglevel=7",
        "82a3ee5d537c3620628270c292ae30cb40c3c878666a7890ee7ef2a08fb535ff",
    ),
    ("sev", AMDSEV, 1, "", "77f613d7bbcdf12a73782ea9e88b0172aeda50d1a54201cb903594ff52846898"),
    ("sev", OVMFX64, 1, None, "b4c021e085fb83ceffe6571a3d357b4a98773c83c474e47f76c876708fe316da"),
]
# SHA-384 of whole VMSA pages, features 1 (section 3.2): (VMM, AP, signature) -> hash.
VMSA_PAGES = {
    (
        "QEMU",
        False,
        0x800F12,
    ): "77920c4c629ff47e90c0e174fc1ad0eb6fa664f88cd4739488058a8c6cb1a77b3856f55378e9518d0da99452d51c553a",
    (
        "QEMU",
        True,
        0x800F12,
    ): "8413b852790765a310d95867a8b00bfca3a802b5a80830044b45e253fe96222657e11e53fcf63eb0e0afd722385bf7b4",
    (
        "QEMU",
        False,
        0x830F10,
    ): "34f43cbd622a2c18c3e042a6d30358628c35d97690fb5d3566644b45b26f7c907c7c20b959a53c74eb6e47414e68bb78",
    (
        "QEMU",
        False,
        0xA00F11,
    ): "728af287318db5f3fc4d2357a969483c4225956dc555b514a78d64ee372112d13b3dca8afd02cdbd1c55697d8ce087f5",
    (
        "QEMU",
        False,
        0xA10F10,
    ): "7d39672d1b8a3e38353a8eef23af9a14a850be7b9c80bd29898aff5cd2386719e5ce72ad660a022def56b15e5e0f899e",
    (
        "QEMU",
        False,
        0xB00F00,
    ): "49ddacf0393b6d9401ac505250ec615e923bc580ff6ce0a0b4c5f2e261b0a972cd4facec381e17ad503ce64f4de8a83e",
    (
        "ec2",
        False,
        0x800F12,
    ): "d08442e8bcdb6a5dcd7f22e4f7fd6979beffb9f0bb54a9d1977407fe84f482abf23c1baae6ce95a6a9e7a94c3c51f412",
    (
        "ec2",
        True,
        0x800F12,
    ): "acff2d22db95b8eb82272d844aa2ad1f8f84218ccbab003697acade12228a6e901256e160d41713c22fed92e0a1ed0e1",
    (
        "gce",
        False,
        0x800F12,
    ): "f9e03177dad7f4819ee193af7cfb70507d8a923ab513412e908bc73460a9dfdaa54215d58952816118ffb2ec281e7fd2",
    (
        "gce",
        True,
        0x800F12,
    ): "5302d262c88780a7a13159a327fa99cf188cab234c680e1f3b6729171380a4312511813a354cab136d69c778050c245a",
    # The sheet has its first 16 bytes, slp/snp-digest-rs 0e5a787 src/vmsa.rs the page.
    (
        "krun",
        False,
        0x800F12,
    ): "f2f96744e064b2aa98ca6c772273509bc6f4cc2eac5b28ef86670d9fdd9efed3668fd2095148a39c82a203aabc5f140e",
}
# The same for the SVSM's vCPU at EIP 0xFFAEA000 with X87_FCW 0 (section 3.3).
SVSM_VMSA_PAGE = "9bcd6592450e93e379ffe14e5e9d4102377d162fddcfaa991c06b2c278e0057836e2c8b6b8617641587b3acfd378eb7d"

# The same as SNP and SVSM, from sev-snp-measure's tests at ae95e59^ (0.0.9): no FPU state was
# measured. The SVSM's were read from guests that ran (its fixtures' README).
SNP_OLD = [
    (
        AMDSEV_OLD,
        "QEMU-before-6.10",
        1,
        0x21,
        "console=ttyS0 loglevel=7",
        "314e4f0794187ffef05702a36546ea5fe02698041b7f7f17d9f418da2d5e4d5cff25256cef9d34888a0dd64dea438780",
    ),
    (
        AMDSEV_OLD,
        "QEMU-before-6.10",
        1,
        0x1,
        "console=ttyS0 loglevel=7",
        "f07864303ad8243132029e8110b92805c78d1135a15da75f67abb9a711d78740347f24ee76f603e650ec4adf3611cc1e",
    ),
    (
        AMDSEV_OLD,
        "QEMU-before-6.10",
        1,
        0x21,
        None,
        "6d9054ed9872a64c968cfbcfa1247cafa792e3f9a395306d95c9937aaa081c643d25f369ccbd34409dafcae90bff55f3",
    ),
    (
        AMDSEV_OLD,
        "QEMU-before-6.10",
        4,
        0x21,
        "",
        "3aa1bdf5a87fad15960f099e82a09e428901c590f2b68d71aa246c168db5e75daf4819d017a9530c56bed2da5c0cdbd7",
    ),
    (
        AMDSEV_OLD,
        "QEMU-before-6.10",
        4,
        0x1,
        "",
        "1c784beb8c49aa604b7fd57fbc73b36ec53a3f5fb48a2b895ad6cc2ea15d18ee7cc15e3e57c792766b45f944c3e81cfe",
    ),
    (
        AMDSEV_OLD,
        "ec2-rdx0",
        1,
        0x21,
        "",
        "cd4a4690a1f679ac8f3d6e446aab8d0061d535cc94615d98c7d7dbe4b16dbceeaf7fc7944e7874b202e27041f179e7e6",
    ),
    (
        AMDSEV_OLD,
        "ec2-rdx0",
        1,
        0x1,
        "",
        "760b6e51039d2d6c1fc6d38ca5c387967d158e0294883e4522c36f89bd61bfc9cdb975cd1ceedffbe1b23b1daf4e3f42",
    ),
]
SVSM_OLD = {
    4: "265aed64f2454253f6b19e49e17041ef052dedf964dd8d2740794a06aee3a720c475e3643a1b7e26b9efce7a107bf77f",
    2: "4ae03ca013690e956bc1eb16bc1c6465788dba64ad88a650db09216fa9cdddf06167bfce810eba8988108e71458dd68b",
}
LEGACY_OLD = [
    (
        "seves",
        AMDSEV_OLD,
        1,
        "",
        "2e91d54814445ad178180af09f881efe4079fc54bfddd0ec1179ecd3cdbdf772",
    ),
    (
        "seves",
        AMDSEV_OLD,
        4,
        "",
        "c05d37600072dc5ff24bafc49410f0369ba3a37c130a7bb7055ac6878be300f7",
    ),
]
# (features, digest of a whole firmware, command line, launch digest) with AMDSEV_OLD's metadata.
FROM_FIRMWARE_DIGEST = (
    0x21,
    "cab7e085874b3acfdbe2d96dcaa3125111f00c35c6fc9708464c2ae74bfdb048a198cb9a9ccae0b3e5e1a33f5f249819",
    "",
    "a076e1b0e6cf55fd94c82e2c25245f8c15f76690b941ba379b31527f82eafe7ad489777ff510d080bac9cd14d41bc205",
)
