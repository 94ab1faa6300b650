# Makes the file a PVH guest: tells the VMM where to enter it in 32-bit protected mode.

.section .note.Xen, "a", @note
    .balign 4
    .long 4, 4, 18                  # name size, value size, XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .long _start
