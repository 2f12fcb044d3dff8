"""Words that tell what a text is: kept short, since each costs time and a long list hits good text."""

import re

# Of the commonest English words those without which there are no sentences.
ENGLISH = {
    *("the", "of", "and", "to", "a", "in", "is", "that", "it", "was", "for", "on", "with", "as", "be", "at", "by"),
    *("this", "had", "not", "but", "from", "or", "have", "you"),
}

# What sells: loans, jobs, papers, pills, gambling, pornography. One of them is news, several are an advertisement.
SALES = re.compile(
    "厂家直销|无效退款|货到付款|立减|优惠券|半价|抢购|名额有限|先到先得|日赚|日结|诚聘|兼职|无抵押|无担保|黑户|当天放款|套现|代还"
    "|办理.{0,4}证|办证|刻章|包过|先办后付|信誉第一|全国包邮|下单|代理加盟|咨询热线|竭诚为您|微信同号|加微信|QQ群|冲！|亲测有效"
    "|彩金|百家乐|老虎机|时时彩|真人娱乐|六合彩|特码|一肖|开奖|首存|荷官|翻本|娱乐城|最新网址|永久网址"
    "|无码|人妻|少妇|制服丝袜|成人视频|伦理电影|午夜福利|激情视频|国产精品|AV在线"
)
SALES_EN = (
    *("no prescription", "best price", "money back", "guaranteed", "order now", "buy now", "buy cheap", "discount"),
    *("free shipping", "worldwide shipping", "cheap ", "click here", "100% satisf", "limited time", "limited offer"),
    *("act now", "writing service", "online casino", "payday loan", " xxx ", " porn ", " milf ", "sex cam", "sex tube"),
    *("sex video", "live girls", " nude "),
)
CONTACT = re.compile(
    r"(?:微信|QQ|扣扣|电话|热线|手机|VX|加V|whatsapp|telegram|call)\D{0,8}[A-Za-z0-9][A-Za-z0-9_\-]{5,}", re.IGNORECASE
)

# Text whose bytes were lost: UTF-8 read as GBK and back, uninitialised memory, UTF-8 read as Latin-1, question marks.
MOJIBAKE = ("锟斤拷", "烫烫烫烫", "屯屯屯屯", "锘縝", "锘匡", "â€", "Ã©", "Ã¤", "Ã¼", "Ã¶", "ï»¿")
QUESTION_MARKS = re.compile(r"\?{4,}")

# What a page's code looks like when it was taken for text. Not `) {`, which all languages like C have.
CODE_OF_PAGES = re.compile(
    r"\{\s*[\w-]+\s*:[^{}\n]{1,200}\}|;\s*[\w-]+:\s*[\w#%.-]+(?=[;}])"  # rules of a style sheet
    r"|\(['\"][#.]|\bvar \w+\s*=|\bfunction\s*\w*\s*\(|\b(?:window|document)\.\w"
)
CODE_LINE = re.compile(r"[{}]|;\s*$|^\s*(?://|/?\*|#)|\w\([^()]*\)\s*$")  # a line that is no prose
TAG = re.compile(r"</?[a-zA-Z][^<>\n]{0,300}>")
MENTIONED_TAG = re.compile(r"<[a-zA-Z][\w:-]*\s*/?>")  # nothing but a name, as in “the <br> tag”
URL = re.compile(r"(?:https?|ftp)://[!-~]+|www\.[!-~]+")
LONG_RUN = re.compile(r"[!-~]{101,}")

# Sentences that stand where a text was cut off.
STUB = re.compile(
    r"展开全文|阅读全文|查看全文|请下载客户端|点击查看更多|登录后(?:可见|查看)|(?:read|continue reading|see) more\W*$",
    re.IGNORECASE,
)
FORUM = re.compile(
    r"^[^\w\n]*(?:顶+|沙发|板凳|路过|前排.{0,4}|支持一下|楼主.{0,10}|求资源|同求|回复可见|看看再说|已收藏.{0,8}|mark|\+1|up)[^\w\n]*$",
    re.MULTILINE,
)
