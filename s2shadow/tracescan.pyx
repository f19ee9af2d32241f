"""The inner loop of the trace import: lines into numbers, about twenty times as fast as regular expressions.

A ``Template`` says how the text of an event is written; it holds a short program of one-byte operations, which
``match`` runs over a line. What the events are, and what becomes of the numbers, is in ``trace.py``.
Every read is checked against the end of the line; a number that is too long for its type is no number.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from libc.stdint cimport int8_t, int16_t, int32_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memchr, memcmp

from string import Formatter

NUMBERS = 12                    # most values that one line can give

cdef enum:
    MAX_NUMBERS = 12
    HEAD_LIMIT = 256            # the CPU's bracket begins before this column
    MAX_WORD = 64

cdef enum:                      # operations of a program
    END
    LITERAL                     # length, bytes
    BLANKS                      # one or more
    HEX                         # hexadecimal, with or without 0x: zero often lacks it where user space formats it
    NUMBER                      # hexadecimal with 0x, else decimal
    DECIMAL                     # may be negative: two's complement
    WORD                        # its first eight bytes, the first one lowest
    REST                        # offsets in the block of what is left of the line: two values
    PASS_WORD
    PASS_TEXT                   # up to the literal that follows
    PASS_CELL                   # up to the next comma
    PASS_PROBE                  # "(address or symbol)", which begins every kprobe event
    LINE_END

cdef dict OPERATIONS = {"x": HEX, "n": NUMBER, "d": DECIMAL, "w": WORD, "rest": REST}
cdef dict PASSED_OVER = {"w": PASS_WORD, "text": PASS_TEXT, "cell": PASS_CELL, "probe": PASS_PROBE}

# EVENT_DTYPE
cdef packed struct event_t:
    uint64_t time, seq, start, end, pa, va, pc, value, root, vttbr, vtcr, hcr
    uint32_t insn, pid, tgid
    int16_t cpu
    uint16_t vm, vcpu, flags
    uint8_t kind
    int8_t level
    uint8_t el, access

# What comes before the text of an event.
cdef struct head_t:
    const uint8_t *comm         # name of the task
    const uint8_t *comm_end
    const uint8_t *name         # of the event
    const uint8_t *name_end
    const uint8_t *body
    uint64_t time               # ns, or ticks of a clock that counts them
    uint32_t pid
    uint32_t tgid
    int32_t cpu


cdef class Template:
    """How a line, or the text of an event, is written.

    ``{name:x}`` is a hexadecimal value, and so on by the operations; a field without a name is passed over; a blank
    stands for one or more; ``$`` at the end is the end of the line, else more text may follow. ``names`` are those of
    the values in their order; ``code`` is the caller's.
    """

    cdef bytes program
    cdef readonly tuple names
    cdef readonly uint8_t code

    def __init__(self, str template, uint8_t code=0):
        cdef list names = []
        program = bytearray()
        whole = template.endswith("$")
        passed = False
        for text, name, conversion, _ in Formatter().parse(template.removesuffix("$")):
            if passed and text[:1] in ("", " "):
                raise ValueError("{:text} ends at a literal, which must follow it")
            passed = conversion == "text"
            for at, part in enumerate(text.split(" ")):
                if at:
                    program.append(BLANKS)
                if part:
                    program += bytes([LITERAL, len(part)]) + part.encode("ascii")
            if name:
                program.append(OPERATIONS[conversion])
                names += [name, f"{name}_end"] if conversion == "rest" else [name]
            elif conversion:
                program.append(PASSED_OVER[conversion])
        if whole:
            program.append(LINE_END)
        if passed:
            raise ValueError("{:text} ends at a literal, which must follow it")
        if len(names) > MAX_NUMBERS:
            raise ValueError(f"a template can name {MAX_NUMBERS} values, got {len(names)}")
        program.append(END)
        self.program = bytes(program)
        self.names = tuple(names)
        self.code = code


# --- one line ----------------------------------------------------------------------------------------------------


cdef inline bint is_digit(uint8_t byte) noexcept nogil:
    return c'0' <= byte <= c'9'


cdef inline bint is_word(uint8_t byte) noexcept nogil:
    return is_digit(byte) or c'a' <= (byte | 0x20) <= c'z' or byte == c'_'


cdef inline bint is_blank(uint8_t byte) noexcept nogil:
    return byte == c' ' or byte == c'\t'


cdef inline int hex_digit(uint8_t byte) noexcept nogil:
    if is_digit(byte):
        return byte - c'0'
    byte |= 0x20
    return byte - c'a' + 10 if c'a' <= byte <= c'f' else -1


cdef inline uint8_t before(const uint8_t *p) noexcept nogil:
    return (p - 1)[0]


cdef inline const uint8_t *blanks(const uint8_t *p, const uint8_t *end) noexcept nogil:
    while p < end and is_blank(p[0]):
        p += 1
    return p


cdef inline const uint8_t *word_end(const uint8_t *p, const uint8_t *end) noexcept nogil:
    while p < end and is_word(p[0]):
        p += 1
    return p


cdef inline const uint8_t *decimal(const uint8_t *p, const uint8_t *end, int limit, uint64_t *value) noexcept nogil:
    """Up to ``limit`` digits (19 always fit); NULL if there are none, or more."""
    cdef const uint8_t *begin = p
    value[0] = 0
    while p < end and is_digit(p[0]):
        if p - begin == limit:
            return NULL
        value[0] = value[0] * 10 + (p[0] - c'0')
        p += 1
    return p if p > begin else NULL


cdef inline const uint8_t *hexadecimal(const uint8_t *p, const uint8_t *end, uint64_t *value) noexcept nogil:
    cdef const uint8_t *begin = p
    cdef int digit
    value[0] = 0
    while p < end:
        digit = hex_digit(p[0])
        if digit < 0:
            break
        if p - begin == 16:
            return NULL
        value[0] = value[0] << 4 | <uint64_t>digit
        p += 1
    return p if p > begin else NULL


cdef inline bint has_prefix(const uint8_t *p, const uint8_t *end) noexcept nogil:
    return end - p > 2 and p[0] == c'0' and p[1] == c'x'


cdef inline const uint8_t *number(uint8_t operation, const uint8_t *p, const uint8_t *end,
                                  uint64_t *value) noexcept nogil:
    cdef bint negative = False
    if operation == DECIMAL:
        negative = p < end and p[0] == c'-'
        p = decimal(p + negative, end, 19, value)
        if negative:
            value[0] = -value[0]
    elif has_prefix(p, end):
        p = hexadecimal(p + 2, end, value)
    elif operation == HEX:
        p = hexadecimal(p, end, value)
    else:
        p = decimal(p, end, 19, value)
    if p != NULL and p < end and is_word(p[0]):
        return NULL
    return p


cdef inline uint64_t packed(const uint8_t *p, const uint8_t *end) noexcept nogil:
    cdef uint64_t value = 0
    cdef int at
    for at in range(8):
        if p + at < end:
            value |= <uint64_t>p[at] << 8 * at
    return value


cdef const uint8_t *find(const uint8_t *p, const uint8_t *end, const uint8_t *text, Py_ssize_t length) noexcept nogil:
    while end - p >= length:
        p = <const uint8_t *>memchr(p, text[0], end - p - length + 1)
        if p == NULL:
            return NULL
        if memcmp(p, text, length) == 0:
            return p
        p += 1
    return NULL


cdef bint match(const uint8_t *op, const uint8_t *p, const uint8_t *end, const uint8_t *block,
                uint64_t *values) noexcept nogil:
    """Whether the text at ``p`` is as the program says; fills ``values``."""
    cdef const uint8_t *begin
    while op[0] != END:
        begin = p
        if op[0] == LITERAL:
            if end - p < op[1] or memcmp(p, op + 2, op[1]) != 0:
                return False
            p += op[1]
            op += 1 + op[1]
        elif op[0] == BLANKS:
            p = blanks(p, end)
            if p == begin:
                return False
        elif op[0] == HEX or op[0] == NUMBER or op[0] == DECIMAL:
            p = number(op[0], p, end, values)
            values += 1
        elif op[0] == WORD or op[0] == PASS_WORD:
            p = word_end(p, end)
            if p == begin or p - begin > MAX_WORD:
                return False
            if op[0] == WORD:
                values[0] = packed(begin, p)
                values += 1
        elif op[0] == REST:
            values[0] = p - block
            values[1] = end - block
            values += 2
            p = end
        elif op[0] == PASS_TEXT:        # a literal follows
            p = find(p, end, op + 3, op[2])
        elif op[0] == PASS_CELL:
            while p < end and p[0] != c',':
                p += 1
        elif op[0] == PASS_PROBE:
            p = <const uint8_t *>memchr(p, c')', end - p) if p < end and p[0] == c'(' else NULL
            if p != NULL:
                p += 1
        elif op[0] == LINE_END and p != end:
            return False
        if p == NULL:
            return False
        op += 1
    return True


cdef inline bint matches(Template template, const uint8_t *p, const uint8_t *end, const uint8_t *block,
                         uint64_t *values):
    return match(<const uint8_t *>PyBytes_AS_STRING(template.program), p, end, block, values)


cdef bint before_cpu(const uint8_t *line, const uint8_t *bracket, head_t *head) noexcept nogil:
    """``comm-pid`` or ``comm-pid (tgid)`` of ftrace and trace-cmd, ``comm pid`` or ``comm tgid/pid`` of perf script.

    Read backwards, since the comm may hold anything: blanks, slashes, dashes, digits.
    """
    cdef const uint8_t *p = bracket
    cdef const uint8_t *end
    cdef uint64_t value = 0
    head.tgid = 0
    while p > line and is_blank(before(p)):
        p -= 1
    if p == bracket or p == line:
        return False
    if before(p) == c')':
        end = p - 1
        p = end
        while p > line and (is_digit(before(p)) or before(p) == c'-' or before(p) == c' '):
            p -= 1
        if p == line or before(p) != c'(':
            return False
        if decimal(blanks(p, end), end, 9, &value) == end:      # dashes: not known
            head.tgid = <uint32_t>value
        p -= 1
        while p > line and is_blank(before(p)):
            p -= 1
    end = p
    while p > line and is_digit(before(p)):
        p -= 1
    if decimal(p, end, 9, &value) == NULL or p == line:
        return False
    head.pid = <uint32_t>value
    if before(p) == c'/':
        end = p - 1
        p = end
        while p > line and is_digit(before(p)):
            p -= 1
        if decimal(p, end, 9, &value) == NULL or p == line or not is_blank(before(p)):
            return False
        head.tgid = <uint32_t>value
    elif before(p) != c'-' and not is_blank(before(p)):
        return False
    p -= 1
    while p > line and is_blank(before(p)):
        p -= 1
    head.comm = blanks(line, p)
    head.comm_end = p
    return head.comm < p


cdef const uint8_t *timestamp(const uint8_t *p, const uint8_t *end, uint64_t *time) noexcept nogil:
    """``seconds.fraction:`` of up to nine digits, or ticks without a point, up to and with the colon."""
    cdef uint64_t fraction = 0
    cdef const uint8_t *begin = p
    p = decimal(p, end, 19, time)
    if p == NULL:
        return NULL
    if p < end and p[0] == c'.':
        if p - begin > 10:
            return NULL
        begin = p + 1
        p = decimal(begin, end, 9, &fraction)
        if p == NULL:
            return NULL
        for _ in range(9 - (p - begin)):
            fraction *= 10
        time[0] = time[0] * 1_000_000_000 + fraction
    return p + 1 if p < end and p[0] == c':' else NULL


cdef bint after_cpu(const uint8_t *p, const uint8_t *end, head_t *head) noexcept nogil:
    """``[cpu]``, the flags (ftrace, newer trace-cmd), the time, the event with or without its group."""
    cdef uint64_t value = 0
    cdef const uint8_t *begin
    cdef const uint8_t *after
    p = decimal(p + 1, end, 4, &value)
    if p == NULL or p == end or p[0] != c']':
        return False
    head.cpu = <int32_t>value
    begin = blanks(p + 1, end)
    p = timestamp(begin, end, &head.time)
    if p == NULL:
        p = begin
        while p < end and not is_blank(p[0]):
            p += 1
        p = timestamp(blanks(p, end), end, &head.time)
        if p == NULL:
            return False
    p = blanks(p, end)
    after = decimal(p, end, 19, &value)         # perf script: the period, where other events were sampled
    if after != NULL and after < end and is_blank(after[0]):
        p = blanks(after, end)
    begin = p
    while p < end and (is_word(p[0]) or p[0] == c'-'):
        p += 1
    if p == begin or p == end or p[0] != c':':
        return False
    after = word_end(p + 1, end)
    if after > p + 1 and after < end and after[0] == c':':      # that was the group
        begin = p + 1
        p = after
    head.name = begin
    head.name_end = p
    head.body = blanks(p + 1, end)
    return p - begin <= MAX_WORD


cdef bint parse_head(const uint8_t *line, const uint8_t *end, head_t *head) noexcept nogil:
    cdef const uint8_t *limit = line + HEAD_LIMIT if end - line > HEAD_LIMIT else end
    cdef const uint8_t *p = line
    while p < limit:
        p = <const uint8_t *>memchr(p, c'[', limit - p)
        if p == NULL:
            return False
        if before_cpu(line, p, head) and after_cpu(p, end, head):
            return True
        p += 1
    return False


cdef uint16_t vcpu_of(const uint8_t *comm, const uint8_t *end) noexcept nogil:
    """The vCPU that a VMM names its thread after: ``CPU 1/KVM`` (QEMU), ``vcpu1``, ``fc_vcpu 1``; else 0xFFFF."""
    cdef uint64_t value = 0
    cdef const uint8_t *p
    p = find(comm, end, b"CPU ", 4)
    if p != NULL:
        p = decimal(p + 4, end, 4, &value)
        return <uint16_t>value if p != NULL and p < end and p[0] == c'/' else 0xFFFF
    p = find(comm, end, b"vcpu", 4)
    if p != NULL:
        p += 4
        if p < end and (p[0] == c' ' or p[0] == c'-'):
            p += 1
        if decimal(p, end, 4, &value) == end:
            return <uint16_t>value
    return 0xFFFF


# --- a block of lines --------------------------------------------------------------------------------------------


cdef inline const uint8_t *line_end(const uint8_t *line, const uint8_t *end) noexcept nogil:
    cdef const uint8_t *found = <const uint8_t *>memchr(line, c'\n', end - line) if line < end else NULL
    return end if found == NULL else found


cdef inline const uint8_t *without_return(const uint8_t *line, const uint8_t *end) noexcept nogil:
    return end - 1 if end > line and before(end) == c'\r' else end


def scan_text(bytes block, uint64_t first_line, dict templates, event_t[::1] rows, uint64_t[:, ::1] values,
              uint8_t[::1] codes, dict others, list odd):
    """Lines of ftrace, trace-cmd or perf script -> (how many are events of ``templates``, lines).

    ``templates`` maps the names of events to ``Template``. For each such event one element of ``rows`` (the head of
    the line), of ``values`` (what the template names) and of ``codes`` (the template's) is filled. Events of other
    names are counted in ``others``; lines that are no events, or whose text is not as the template says, go to
    ``odd`` as (line, text). The arrays must hold one element per line; a newline at the end of the block begins one
    more line.
    """
    cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(block)
    cdef const uint8_t *end = text + PyBytes_GET_SIZE(block)
    cdef const uint8_t *line = text
    cdef const uint8_t *stop
    cdef const uint8_t *after
    cdef head_t head
    cdef event_t *row
    cdef Template template
    cdef Py_ssize_t n = 0, lines = 0, room = rows.shape[0]
    if values.shape[1] != MAX_NUMBERS or values.shape[0] < room or codes.shape[0] < room:
        raise ValueError("values and codes must be as long as rows")
    while line <= end:
        stop = line_end(line, end)
        after = without_return(line, stop)
        if parse_head(line, after, &head):
            name = PyBytes_FromStringAndSize(<const char *>head.name, head.name_end - head.name)
            template = templates.get(name)
            if template is None:
                others[name] = others.get(name, 0) + 1
            elif n == room:
                raise ValueError("rows must hold one element per line")
            elif matches(template, head.body, after, text, &values[n, 0]):
                row = &rows[n]
                row.seq = first_line + lines
                row.time = head.time
                row.pid = head.pid
                row.tgid = head.tgid
                row.cpu = <int16_t>head.cpu
                row.vcpu = vcpu_of(head.comm, head.comm_end)
                codes[n] = template.code
                n += 1
            else:
                odd.append((first_line + lines, line[:after - line]))
        elif after > line:
            odd.append((first_line + lines, line[:after - line]))
        lines += 1
        line = stop + 1
    return n, lines


def scan_lines(bytes block, uint64_t first_line, Template template, uint64_t[:, ::1] values, uint64_t[::1] numbers,
               list odd):
    """Lines that are all written alike, as those of a CSV -> (how many are as the template says, lines).

    For each that is, one element of ``values`` and of ``numbers`` (the number of the line) is filled; the others that
    are not blank go to ``odd`` as (line, text). The arrays must hold one element per line.
    """
    cdef const uint8_t *text = <const uint8_t *>PyBytes_AS_STRING(block)
    cdef const uint8_t *end = text + PyBytes_GET_SIZE(block)
    cdef const uint8_t *line = text
    cdef const uint8_t *stop
    cdef const uint8_t *after
    cdef Py_ssize_t n = 0, lines = 0, room = values.shape[0]
    if template is None or values.shape[1] != MAX_NUMBERS or numbers.shape[0] < room:
        raise ValueError("numbers must be as long as values")
    while line <= end:
        stop = line_end(line, end)
        after = without_return(line, stop)
        if after > line:
            if n == room:
                raise ValueError("values must hold one element per line")
            if matches(template, line, after, text, &values[n, 0]):
                numbers[n] = first_line + lines
                n += 1
            else:
                odd.append((first_line + lines, line[:after - line]))
        lines += 1
        line = stop + 1
    return n, lines
